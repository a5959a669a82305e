"""Lineage on stores: a property over generated graphs, and the cases a user meets."""

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gyrocompass.core.artifact import Artifact, DocumentRow
from gyrocompass.core.errors import BadInput
from gyrocompass.core.lineage import Node, render, walk
from gyrocompass.core.store import Store

ROLES = ("train", "init", "tokenizer", "held_out", "held_out_chat")


def name(number: int, life: int = 0) -> str:
    return f"{number:04x}document{life}"


def row(number: int, status: str = "kept", origins: tuple[int, ...] = (), life: int = 0) -> DocumentRow:
    origin_ids = tuple(name(origin, life) for origin in origins)
    return DocumentRow(name(number, life), f"lib/{number}.py", "stdlib", "code", status, origin_ids)


def create(store: Store, key: str, kind="model", parents=None, documents=None) -> Artifact:
    with store.create(key, kind, parents=parents, recipe={"key": key}) as draft:
        draft.counts["steps"] = 3
        draft.documents = documents
    return draft.artifact


def ids(nodes: tuple[Node, ...]) -> set[str]:
    return {node.id for node in nodes}.union(*(ids(node.links) for node in nodes))


def nodes(tree: tuple[Node, ...]) -> list[Node]:
    return [*tree, *(below for node in tree for below in nodes(node.links))]


@st.composite
def graphs(draw):
    """Documents with what they were derived from; artifacts with parents by role and perhaps a listing."""
    origins = [
        tuple(draw(st.lists(st.integers(0, number - 1), max_size=2, unique=True))) if number else ()
        for number in range(draw(st.integers(1, 6)))
    ]
    statuses = st.sampled_from(["kept", "kept", "dropped", "quarantined"])
    listings = st.none() | st.dictionaries(st.integers(0, len(origins) - 1), statuses)
    artifacts = []
    for number in range(draw(st.integers(1, 7))):
        parents = st.dictionaries(st.sampled_from(ROLES), st.integers(0, number - 1), max_size=3)
        artifacts.append((draw(parents) if number else {}, draw(listings)))
    return origins, artifacts


def simulate(origins, artifacts):
    """What each artifact saw and learned from, by carrying the documents forward from stage to stage."""
    content = []
    for document, direct in enumerate(origins):
        content.append({document}.union(*(content[origin] for origin in direct)))
    saw, learned = [], []
    for parents, listing in artifacts:
        if listing is None:
            saw.append(set().union(*(saw[parent] for parent in parents.values())))
            taught = [parent for role, parent in parents.items() if not role.startswith("held_out")]
            learned.append(set().union(*(learned[parent] for parent in taught)))
        else:
            kept = set().union(
                *(content[document] for document, status in listing.items() if status == "kept")
            )
            saw.append(kept)
            learned.append(kept)
    return saw, learned


def recorded_origins(origins, listed, document) -> tuple[int, ...]:
    """What a row must say: the direct origins, and what is behind those that no artifact lists."""
    behind = [
        recorded_origins(origins, listed, origin) for origin in origins[document] if origin not in listed
    ]
    return tuple({*origins[document]}.union(*behind))


@pytest.fixture(scope="module")
def many_lives(tmp_path_factory):
    """One store for all generated graphs, and a number for each of them."""
    return Store(tmp_path_factory.mktemp("store")), itertools.count()


@given(graph=graphs())
@settings(deadline=None, max_examples=30)
def test_lineage_finds_all_that_saw_a_document_and_nothing_else(many_lives, graph):
    store, counter = many_lives
    life = next(counter)
    origins, artifacts = graph
    saw, learned = simulate(origins, artifacts)
    listed = {document for _, listing in artifacts for document in listing or ()}
    made: list[Artifact] = []
    for number, (parents, listing) in enumerate(artifacts):
        by_role = {role: made[parent] for role, parent in parents.items()}
        rows = (
            None
            if listing is None
            else [
                row(document, status, recorded_origins(origins, listed, document), life)
                for document, status in listing.items()
            ]
        )
        made.append(create(store, f"{life}-{number}", parents=by_role, documents=rows))

    for document in listed.union(*(origins[listed_one] for listed_one in listed)):
        lineage = walk(store, name(document, life))
        expected = {made[number].id for number, seen in enumerate(saw) if document in seen}
        taught = {made[number].id for number, seen in enumerate(learned) if document in seen}
        assert lineage.saw == expected
        assert lineage.learned == taught
        assert ids(lineage.down) >= expected
        shown = {node.id: node.measured_only for node in nodes(lineage.down)}
        assert {artifact_id for artifact_id, measured in shown.items() if measured} == expected - taught
        not_used = set(shown) - expected
        listing_it = {made[n].id for n, (_, listing) in enumerate(artifacts) if listing is not None}
        assert not_used <= listing_it, "what is shown beyond lists it as dropped"
        assert all(node.role != "kept" for node in nodes(lineage.down) if node.id in not_used)

    for number, artifact in enumerate(made):
        lineage = walk(store, artifact.id)
        assert ids((lineage.artifact,)) == {artifact.id} | {
            made[other].id for other in ancestors(artifacts, number)
        }
        assert ids(lineage.down) == {
            made[other].id for other in range(len(made)) if number in ancestors(artifacts, other)
        }


def ancestors(artifacts, number) -> set[int]:
    direct = set(artifacts[number][0].values())
    return direct.union(*(ancestors(artifacts, parent) for parent in direct))


@pytest.fixture
def life(store):
    """A corpus, split; a model of one side, watched on the other; fine-tuned on pairs; scored."""
    corpus = create(store, "corpus", "corpus", documents=[row(1), row(2), row(3, "quarantined")])
    train = create(store, "train", "tokens", {"corpus": corpus}, [row(1)])
    held_out = create(store, "held", "tokens", {"corpus": corpus}, [row(2)])
    model = create(store, "model", "model", {"train": train, "held_out": held_out})
    pairs = create(store, "pairs", "tokens", {"corpus": corpus}, [row(11, origins=(1,))])
    tuned = create(store, "tuned", "model", {"init": model, "train": pairs})
    scores = create(store, "scores", "scores", {"model": tuned, "held_out": held_out})
    return {
        "corpus": corpus.id,
        "train": train.id,
        "held_out": held_out.id,
        "model": model.id,
        "pairs": pairs.id,
        "tuned": tuned.id,
        "scores": scores.id,
    }


def test_a_held_out_document_was_never_trained_on(store, life):
    lineage = walk(store, name(2))
    assert lineage.saw == {life[key] for key in ("corpus", "held_out", "model", "tuned", "scores")}
    assert lineage.learned == {life["corpus"], life["held_out"]}
    assert {node.role for node in nodes(lineage.down) if node.id == life["model"]} == {"held_out"}


def test_a_document_taught_through_what_was_derived_from_it(store, life):
    lineage = walk(store, name(1))
    assert lineage.learned == set(life.values()) - {life["held_out"]}
    assert lineage.document.derived_ids == (name(11),)
    derived = walk(store, name(11))
    assert derived.document.origins[0].path == "lib/1.py"
    assert derived.saw == {life[key] for key in ("pairs", "tuned", "scores")}


def test_a_quarantined_document_was_seen_by_none(store, life):
    lineage = walk(store, name(3))
    assert lineage.saw == frozenset()
    assert [(node.role, node.id) for node in lineage.down] == [("quarantined", life["corpus"])]


def test_an_artifact_is_followed_up_to_recipes_and_documents(store, life):
    up = walk(store, life["tuned"]).artifact
    assert up.recipe == {"key": "tuned"}
    assert up.counts == {"steps": 3}
    assert ids((up,)) == set(life.values()) - {life["scores"]}
    (train,) = [node for node in nodes((up,)) if node.role == "train" and node.id == life["train"]]
    assert [tuple(entry) for entry in train.documents] == [("stdlib", "code", "kept", 1)]


def test_where_the_graph_joins_again_it_is_told_once(store, life):
    up = walk(store, life["scores"]).artifact
    twice = [node for node in nodes((up,)) if node.id == life["held_out"]]
    assert sorted((node.again, bool(node.links)) for node in twice) == [(False, True), (True, False)]


def test_long_diamonds_stay_small(store):
    above = create(store, "0")
    for number in range(1, 16):
        above = create(store, str(number), parents={"init": above, "reference": above})
    assert len(nodes((walk(store, above.id).artifact,))) == 31


@pytest.mark.parametrize("text", ["lib/1.py", "1.py", name(11), "000b"])
def test_documents_by_path_and_by_the_beginning_of_the_id(store, life, text):
    assert walk(store, text).document.id in (name(1), name(11))


def test_names_that_mean_nothing_or_too_much(store, life):
    with pytest.raises(BadInput, match="no artifact and no document 'nobody'"):
        walk(store, "nobody")
    with pytest.raises(BadInput, match=r"may be any of: .*0001document0 \(lib/1.py\)"):
        walk(store, "000")
    with pytest.raises(BadInput, match="any of: tokens-"):
        walk(store, "tokens")
    with pytest.raises(BadInput, match="did you mean scores-"):
        walk(store, life["scores"].replace("sc", "cs"))


def test_an_origin_that_nothing_lists(store):
    made = create(store, "pairs", documents=[row(11, origins=(1,))])
    lineage = walk(store, name(1))
    assert lineage.saw == {made.id}
    assert lineage.document.path == ""


def test_what_is_drawn(store, life):
    def drawn(text: str) -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(render(walk(store, text)))
        return console.file.getvalue()

    of_artifact = drawn(life["tuned"])
    for expected in ("made from", "used by", f"init: {life['model']}", '{"key":"tuned"}', "1 documents kept"):
        assert expected in of_artifact
    of_document = drawn(name(2))
    assert f"held_out: {life['model']} (held out: measured, not learned from)" in of_document
    assert "listed by (5 artifacts saw it)" in of_document
    assert "lib/1.py" in drawn(name(11))
