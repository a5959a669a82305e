import random
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from curate.annotation_cases import batch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, ConfigError, MissingDependency
from gyrocompass.data.curate import licence_evidence
from gyrocompass.data.curate.licence_policy import Attributed, LicencePolicy, attribution_text, read_policy
from gyrocompass.data.curate.licences import Licences
from gyrocompass.data.curate.objections import Objections, read_objections
from gyrocompass.data.curate.step import MemoryCorpus

MIT = """MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal"""
BSD3 = """Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:
3. Neither the name of the copyright holder nor the names of its contributors may be used to endorse"""
GPL = """ * This program is free software; you can redistribute it and/or modify
 * it under the terms of the GNU General Public License as published by
 * the Free Software Foundation; either version 2 of the License, or
 * (at your option) any later version."""
LGPL = """# it under the terms of the GNU Lesser General Public License, version 2.1, as published"""
APACHE = '// Licensed under the Apache License, Version 2.0 (the "License");'
EXPAT = (
    "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nLicense: GPL-2+ or Expat\n"
)


@pytest.mark.parametrize(
    ("text", "path", "kind", "licence"),
    [
        ("/* SPDX-License-Identifier: (GPL-2.0+ OR MIT) */", "a.c", "header", "GPL-2.0-or-later OR MIT"),
        (MIT, "LICENSE", "text", "MIT"),
        (BSD3, "COPYING", "text", "BSD-3-Clause"),
        (BSD3.replace("Neither the name", "Nothing"), "COPYING", "text", "BSD-3-Clause"),
        (BSD3.partition("3.")[0], "COPYING", "text", "BSD-2-Clause"),
        (GPL, "a.c", "notice", "GPL-2.0-or-later"),
        (GPL.partition(", or\n")[0] + ".", "a.c", "notice", "GPL-2.0-only"),
        (LGPL, "a.py", "notice", "LGPL-2.1-only"),
        (APACHE, "a.go", "notice", "Apache-2.0"),
        ("under https://creativecommons.org/licenses/by-sa/4.0/", "a.md", "url", "CC-BY-SA-4.0"),
        ('[project]\nlicense = "MIT"\n', "p/pyproject.toml", "metadata", "MIT"),
        ('license = { text = "Apache-2.0" }\n', "p/pyproject.toml", "metadata", "Apache-2.0"),
        ('{\n  "license": "ISC",\n}', "p/package.json", "metadata", "ISC"),
        ("Classifier: License :: OSI Approved :: BSD License\n", "METADATA", "metadata", "BSD-3-Clause"),
        (EXPAT, "usr/share/doc/x/copyright", "metadata", "GPL-2.0-or-later OR MIT"),
    ],
)
def test_evidence_of_each_kind(text: str, path: str, kind: str, licence: str) -> None:
    best = licence_evidence.find(text, path)[0]
    assert (best.kind, best.licence) == (kind, licence)
    assert licence_evidence.conclude(licence_evidence.find(text, path))[0] == licence


@pytest.mark.parametrize(
    "text",
    ["nothing at all", "The license of a driver is renewed.", 'license = "see file"',
     "def licence(self): pass",
     "The GNU General Public License is long."],
)  # fmt: skip
def test_talk_about_licences_is_no_evidence(text: str) -> None:
    assert licence_evidence.find(text, "a.py") == []


def test_licence_texts_of_this_machine_are_told_apart() -> None:
    folder = Path("/usr/share/common-licenses")
    expected = {"Apache-2.0": "Apache-2.0", "BSD": "BSD-3-Clause", "CC0-1.0": "CC0-1.0",
                "GPL-1": "GPL-1.0-only", "GPL-2": "GPL-2.0-only", "GPL-3": "GPL-3.0-only",
                "LGPL-2": "LGPL-2.0-only", "LGPL-2.1": "LGPL-2.1-only", "LGPL-3": "LGPL-3.0-only",
                "MPL-1.1": "MPL-1.1", "MPL-2.0": "MPL-2.0", "GFDL-1.3": "GFDL-1.3-only"}  # fmt: skip
    present = {name: licence for name, licence in expected.items() if (folder / name).is_file()}
    if not present:
        pytest.skip("this machine has no /usr/share/common-licenses")
    for name, licence in present.items():
        text = (folder / name).read_text("utf-8", "replace")
        for classify in (False, True):
            found, score, _ = licence_evidence.conclude(
                licence_evidence.find(text, f"LICENSES/{name}.txt", classify)
            )
            if classify:  # it also reads the notice that a licence text proposes
                assert found is not None and licence in found.split(" AND ") and score == 0.98, name
            else:
                assert (found, score) == (licence, 0.9), name


def test_a_header_that_its_own_words_contradict_is_a_conflict() -> None:
    evidence = licence_evidence.find(f"# SPDX-License-Identifier: MIT\n{BSD3}", "a.py")
    assert licence_evidence.conclude(evidence) == ("MIT", 1.0, True)
    agreeing = licence_evidence.find(f"# SPDX-License-Identifier: MIT\n{MIT}", "a.py")
    assert licence_evidence.conclude(agreeing) == ("MIT", 1.0, False)


def test_copyright_lines() -> None:
    text = "# Copyright (c) 2020-2024, Anna B.  All rights reserved.\n/* © 2001 C. D. */\nCOPYRIGHT SIGN\n"
    assert licence_evidence.copyrights(text) == ["2020-2024, Anna B", "2001 C. D."]
    assert licence_evidence.copyrights("the copyright holder may") == []


def annotations(step: Licences, documents: pa.RecordBatch, size: int = 100) -> dict[str, dict[str, object]]:
    parts = [documents.slice(start, size) for start in range(0, documents.num_rows, size)] or [documents]
    resolved = step.resolve(iter([step.signatures(part) for part in parts]), MemoryCorpus(parts))
    return {row["id"]: row for row in resolved.to_pylist()}


PACKAGE = {
    "texts": [
        MIT,
        "x = 1",
        "y = 2",
        "# SPDX-License-Identifier: GPL-3.0-only\nz = 3",
        "x = 1",
        "w = 4",
        "v = 5",
    ],
    "path": ["a/LICENSE", "a/x.py", "a/sub/y.py", "a/z.py", "b/x.py", "b/w.py", "a2/v.py"],
    "content_hash": ["l", "x", "y", "z", "x", "w", "v"],
    "licence": [None, None, None, None, "Apache-2.0", None, None],
}


def test_a_package_speaks_for_its_files_and_copies_are_under_the_strictest() -> None:
    rows = [*annotations(Licences(), batch(**PACKAGE)).values()]
    found = [(row["expression"], row["origin"], row["verdict"]) for row in rows]
    assert found == [
        ("MIT", "text", "attribution"),
        ("Apache-2.0 AND MIT", "copy", "attribution"),
        ("MIT", "package", "attribution"),
        ("GPL-3.0-only", "header", "refused"),
        ("Apache-2.0 AND MIT", "copy", "attribution"),
        (None, None, "unknown"),
        (None, None, "unknown"),
    ]
    assert [row["conflict"] for row in rows] == [False, True, False, False, True, None, None]


def test_near_duplicates_are_those_an_earlier_step_found() -> None:
    documents = batch(**PACKAGE).append_column(
        "fuzzy.cluster", pa.array([None, None, "c", "c", None, None, None], pa.string())
    )
    rows = [*annotations(Licences(clusters=("fuzzy.cluster",)), documents).values()]
    assert rows[2]["expression"] == rows[3]["expression"] == "GPL-3.0-only AND MIT"
    assert rows[2]["strictness"] == "strong_copyleft" and rows[2]["verdict"] == "refused"


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.randoms(use_true_random=False))
def test_neither_order_nor_batches_matter(size: int, chance: random.Random) -> None:
    documents = batch(**PACKAGE)
    order = list(range(documents.num_rows))
    chance.shuffle(order)
    assert annotations(Licences(), documents.take(pa.array(order)), size) == annotations(
        Licences(), documents
    )


def test_no_documents_have_no_licences() -> None:
    step, nothing = Licences(), batch([])
    assert step.resolve(iter([step.signatures(nothing)]), MemoryCorpus([nothing])).num_rows == 0


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("CC0-1.0", "allowed"), ("MIT", "attribution"), ("GPL-3.0-only", "refused"), ("MIT OR GPL-3.0-only",
        "attribution"),
        ("MIT AND GPL-3.0-only", "refused"), ("LicenseRef-Mine", "unknown"), (None, "refused"),
        ("CC-BY-SA-4.0", "attribution"),
        ("CC-BY-SA-3.0", "allowed"),
    ],
)  # fmt: skip
def test_the_entry_that_says_most_decides(expression: str | None, verdict: str) -> None:
    policy = LicencePolicy(
        allowed=("public_domain", "CC-BY-SA-3.0"),
        attribution=("permissive", "CC-BY-SA-*"),
        unlicensed="refused",
    )
    assert policy.verdict(expression) == verdict


def test_mistakes_in_a_policy_are_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("allowed: [MTI]\n")
    with pytest.raises(ConfigError, match=r"policy.yaml:1.*did you mean MIT"):
        read_policy(path)
    path.write_text("allowed: [MIT]\nrefused: [MIT]\n")
    with pytest.raises(ConfigError, match="more than once: MIT"):
        read_policy(path)
    path.write_text("allowed: [MIT]\nunlicensed: allowed\n")
    assert read_policy(path).verdict(None) == "allowed"


def test_an_attribution_names_everybody_in_any_order() -> None:
    documents = [Attributed("files", f"{n}.py", "MIT", (f"20{n:02} Anna",)) for n in range(21)]
    documents.append(Attributed("docs", "a.md", None))
    text = attribution_text(documents)
    assert text == attribution_text(documents[::-1])
    assert "files: 21 documents" in text and "Copyright 2007 Anna" in text and "7.py" not in text
    assert "No licence known" in text and "  a.md" in text


def test_a_classifier_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "licenseclassifier", None)
    with pytest.raises(MissingDependency, match="licenseclassifier"):
        Licences(classify=True).signatures(batch([MIT], path=["LICENSE"]))


def test_objections_by_domain_and_author(tmp_path: Path) -> None:
    documents = batch(
        [
            "x",
            "x",
            "# Copyright 2020 Anna B.\n",
            "__author__ = 'Carl <carl@posteo.de>'\n",
            "mentions Anna B. only",
        ],
        path=["https://www.example.org/page", "https://counterexample.org/", "c.py", "d.py", "e.md"],
    )
    lists = tmp_path / "list"
    lists.write_text(
        "# wishes\ndomain: example.org\nauthor: anna b.\n\nauthor: carl@posteo.de  # by letter\n"
    )
    rows = read_objections([lists]).annotate(documents)
    assert rows["listed"].to_pylist() == [True, False, True, True, False]
    assert rows["entry"].to_pylist()[:2] == ["domain: example.org", None]
    assert Objections(entries=()).annotate(documents.slice(0, 0)).schema == rows.schema


@pytest.mark.parametrize(
    ("line", "reason"),
    [("athor: x", "did you mean author"), ("author:", "says which author"), ("hello", "begins with")],
)
def test_a_wish_that_cannot_be_read_is_an_error(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "list").write_text(f"domain: a.org\n{line}\n")
    with pytest.raises(BadInput, match=reason) as error:
        read_objections([tmp_path / "list"])
    assert error.value.where == f"{tmp_path / 'list'}:2"
    with pytest.raises(BadInput, match="cannot be read"):
        read_objections([tmp_path / "none"])
