import sys

import pytest
from curate.annotation_cases import batch, check_step, library_texts
from pydantic import ValidationError

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.data.curate.code_language import CodeLanguage, identify
from gyrocompass.data.curate.domain import Domain
from gyrocompass.data.curate.language import Language, identifier

SENTENCES = {
    "en": "The weather was fine and we walked along the river until it was dark.",
    "de": "Das Wetter war schön, und wir gingen am Fluss entlang, bis es dunkel wurde.",
    "fr": "Il faisait beau et nous avons marché le long de la rivière jusqu'à la nuit.",
    "es": "Hacía buen tiempo y caminamos junto al río hasta que se hizo de noche.",
    "it": "Il tempo era bello e abbiamo camminato lungo il fiume fino a sera.",
    "pl": "Pogoda była ładna i szliśmy wzdłuż rzeki, aż zrobiło się ciemno.",
    "ru": "Погода была хорошая, и мы шли вдоль реки, пока не стемнело.",
    "el": "Ο καιρός ήταν καλός και περπατήσαμε δίπλα στο ποτάμι μέχρι που νύχτωσε.",
    "zh": "天气很好，我们沿着河边走到天黑。",
    "ja": "天気が良かったので、暗くなるまで川沿いを歩きました。",
    "ar": "كان الطقس جميلا ومشينا على طول النهر حتى حل الظلام.",
}


def test_sentences_in_eleven_languages() -> None:
    rows = check_step(Language(), batch([*SENTENCES.values(), "12345 -- ...", ""]))
    assert rows["label"].to_pylist() == [*SENTENCES, "und", "und"]
    assert rows["score"].to_pylist()[-1] == 0.0


def test_long_texts_are_sampled_and_code_is_skipped() -> None:
    long = SENTENCES["de"] + SENTENCES["fr"] * 3000
    rows = Language(sample_characters=300).annotate(
        batch([long, "x = 1", "y"], slice=["prose", "code/tests", "codex"])
    )
    assert rows["label"].to_pylist()[:2] == ["fr", None] and rows["label"][2].as_py() is not None


def test_languages_are_chosen_from_those_that_are_asked_for() -> None:
    rows = Language(languages=("de", "en"), minimum_score=0).annotate(batch([SENTENCES["fr"]]))
    assert rows["label"][0].as_py() in {"de", "en"}
    with pytest.raises(BadInput, match="xx"):
        Language(languages=("xx",)).annotate(batch(["a"]))


def test_a_model_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MissingDependency, match="py3langid"):
        Language().annotate(batch(["a"]))


SNIPPETS = {
    "python": "import os\n\n\ndef f(x):\n    if x:\n        return os.path.join(x)\n\n\nclass A(B):\n    "
    "pass\n",
    "go": 'package main\n\nimport (\n\t"fmt"\n)\n\nfunc main() {\n\tx := 1\n\tfmt.Println(x)\n}\n',
    "rust": 'use std::io;\n\npub fn main() {\n    let mut x = 1;\n    println!("{}", x);\n}\n',
    "java": "package a.b;\n\nimport java.util.List;\n\npublic class A {\n    @Override\n    public void "
    "f() {}\n}\n",
    "shell": 'if [ -z "$X" ]; then\n  echo "no"\nfi\nfor f in *.txt; do\n  cat ${f%.txt}\ndone\n',
    "sql": "CREATE TABLE a (b INT);\nINSERT INTO a VALUES (1);\nSELECT b FROM a WHERE b > 0;\n",
    "latex": "\\documentclass{article}\n\\usepackage{x}\n\\begin{document}\n\\section{A}\n\\end{document}\n",
    "html": "<!DOCTYPE html>\n<html>\n<body>\n<p>Hello</p>\n<div>a</div>\n</body></html>\n",
}


@pytest.mark.parametrize("label", SNIPPETS)
def test_code_without_a_name_is_known_by_its_constructs(label: str) -> None:
    found, score = identify("unnamed", SNIPPETS[label])
    assert found == label and 0 < score < 0.9


@pytest.mark.parametrize(("path", "label"), [("a/b.RS", "rust"), ("x/Makefile", "make"),
                                             ("Dockerfile", "dockerfile"), ("a.h", "c"),
                                             ("man/ls.1", "roff")])  # fmt: skip
def test_names_decide(path: str, label: str) -> None:
    assert identify(path, "") == (label, 0.95)
    assert identify("a.h", "namespace a {\nstd::string b;\n}") == ("c++", 0.95)


def test_prose_is_no_code() -> None:
    rows = check_step(CodeLanguage(), batch([*SENTENCES.values(), SNIPPETS["python"]]))
    assert rows["label"].to_pylist() == [None] * len(SENTENCES) + ["python"]
    assert rows["comments"].to_pylist() == [None] * len(SENTENCES) + [0.0]


def test_files_of_the_library_are_python_without_their_names() -> None:
    texts = [text for text in library_texts(80) if len(text) > 2000]
    labels = [identify("unnamed", text)[0] for text in texts]
    assert len(labels) > 30 and labels.count("python") >= 0.9 * len(labels), labels


def test_sites_and_subjects() -> None:
    documents = batch(
        [
            "The court heard the plaintiff and the defendant.",
            "Mix flour, butter and sugar, and bake.",
            "Nothing much.",
            "",
        ],
        path=["https://www.example.co.uk/a", "b.txt", "http://10.0.0.1/", "c"],
        source=["web", "https://kitchen.example.org/", "web", "web"],
    )
    rows = check_step(Domain(), documents)
    assert rows["subject"].to_pylist() == ["law", "cooking", None, None]
    assert rows["site"].to_pylist() == ["example.co.uk", "example.org", "10.0.0.1", None]
    assert rows["score"].to_pylist()[2:] == [None, None]
    with pytest.raises(ValidationError, match="single words"):
        Domain(subjects={"law": ("the court",)})
    assert Domain(subjects={}).annotate(documents)["subject"].to_pylist() == [None] * 4
