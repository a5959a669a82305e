"""What a document says of its own licence: headers, notices, package metadata, whole licence texts.

    text, path --find--> [Evidence("header", "MIT", 1.0, start, end), ...]

    header    an `SPDX-License-Identifier` line                                          1.0
    metadata  the licence field of pyproject.toml, package.json, PKG-INFO, ...           .95
    text      the title or first words of a licence, as a licence file has them          .9
    notice    a sentence that puts the text under a licence                              .9
    url       a link to a licence                                                        .6

What a whole GNU or Mozilla licence says of its sister licences is no notice. Hints are searched for first, so
that most documents cost a few passes of plain search. The classifier of the package `licenseclassifier`
(extra `licences`) knows a few hundred licence texts instead of some twenty; it is tried at licence files and
at texts with a hint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.curate import spdx


class Evidence(NamedTuple):
    """One thing that says which licence a text is under."""

    kind: str
    licence: str
    """A normal SPDX expression."""
    score: float
    start: int
    end: int


_HINTS = re.compile(
    rb"licen[sc]e|copying|spdx-|creativecommons\.org|permission (?:is hereby|to use)|redistribution and use|"
    rb"public domain|free and unencumbered|all rights reserved"
)
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.:+()\- \t]+)")
_METADATA_FILES = frozenset(
    {
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
        "package.json",
        "cargo.toml",
        "pkg-info",
        "metadata",
        "composer.json",
    }
)
_METADATA = re.compile(
    r"(?mi)^\s*(?:License-Expression:|License:|[\"']?license[\"']?\s*[:=]\s*(?:\{\s*(?:text"
    r"|[\"']type[\"'])\s*[:=]\s*)?)"
    r"\s*[\"']?([A-Za-z0-9.+()\- ]{2,80}?)[\"']?\s*(?:[,}]|$)"
)
_CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?([A-Za-z0-9.+() \-]+)")
_DEBIAN = re.compile(r"(?m)^License:[ \t]*(\S[^\n]{0,100})$")
_LICENCE_FILE = re.compile(r"(?i)^(?:li[cs]en[cs]e|copying|unlicense|notice|copyright)s?(?:[.-][\w.-]+)?$")

_CLASSIFIERS = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "GNU Affero General Public License v3": "AGPL-3.0-only",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Public Domain": "LicenseRef-public-domain",
}


def _words(phrase: str) -> str:
    """A phrase as a pattern: any white space and comment signs between its words."""
    return r"[\s#*/;%\"'.,:()-]+".join(phrase.split(" "))


_LATER = (
    _words(r"version (\d)(?:\.(\d))?")
    + f"(?:{_words(' of the Licen[sc]e')})?({_words(' or (?:at your option )?any later')})?"
)
_TEXTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (licence, re.compile(f"(?i){_words(phrase)}"))
    for licence, phrase in (
        ("MIT", "Permission is hereby granted, free of charge, to any person obtaining a copy of this "
            "software and associated"),
        ("ISC", "Permission to use, copy, modify, and(?:/or)? distribute this software for any purpose "
            "with or without fee is"),
        ("Unlicense", "This is free and unencumbered software released into the public domain"),
        ("BSL-1.0", "Permission is hereby granted, free of charge, to any person or organization obtaining "
            "a copy of the software and accompanying documentation covered by this license"),
        ("Zlib", "This software is provided as-is, without any express or implied warranty"),
        ("PSF-2.0", "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
        ("Apache-2.0", "Apache License Version 2.0, January 2004"),
        ("MPL-2.0", "Mozilla Public License Version 2.0"),
        ("GPL-2.0-only", "GNU GENERAL PUBLIC LICENSE Version 2, June 1991"),
        ("GPL-3.0-only", "GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007"),
        ("LGPL-2.1-only", "GNU LESSER GENERAL PUBLIC LICENSE Version 2.1, February 1999"),
        ("LGPL-3.0-only", "GNU LESSER GENERAL PUBLIC LICENSE Version 3, 29 June 2007"),
        ("AGPL-3.0-only", "GNU AFFERO GENERAL PUBLIC LICENSE Version 3, 19 November 2007"),
        ("GPL-1.0-only", "GNU GENERAL PUBLIC LICENSE Version 1, February 1989"),
        ("LGPL-2.0-only", "GNU LIBRARY GENERAL PUBLIC LICENSE Version 2, June 1991"),
        ("GFDL-1.2-only", "GNU Free Documentation License Version 1.2, November 2002"),
        ("GFDL-1.3-only", "GNU Free Documentation License Version 1.3, 3 November 2008"),
        ("MPL-1.1", "Mozilla Public License Version 1.1"),
        ("Artistic-1.0-Perl", "The Artistic License Preamble"),
        ("EPL-2.0", "Eclipse Public License - v 2.0"),
        ("CC0-1.0", "CC0 1.0 Universal"),
    )
)  # fmt: skip
_BSD = re.compile(
    f"(?i){_words('Redistribution and use in source and binary forms, with or without modification, are')}"
)
_BSD_NAME = re.compile(
    f"(?i){_words('Neither the name')}|{_words('may not be used to endorse')}|{_words('The names? of')}"
)
_BSD_ADVERT = re.compile(f"(?i){_words('All advertising materials mentioning')}")
_NOTICES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (licence, re.compile(f"(?i){_words(phrase)}"))
    for licence, phrase in (
        ("Apache-2.0", "Licensed under the Apache License, Version 2.0"),
        ("MPL-2.0", "subject to the terms of the Mozilla Public License, v. 2.0"),
        ("MIT", "(?:Licensed|Released|distributed) under the (?:terms of the )?MIT (?:License|Licence)"),
        ("PSF-2.0", "Licensed to PSF under a Contributor Agreement"),
        ("BSD-3-Clause", "Use of this source code is governed by a BSD-style license"),
        ("LicenseRef-public-domain", "(?:released|placed|is|donated) (?:in|into|to) the public domain"),
        ("LicenseRef-proprietary", "(?:proprietary and confidential|confidential and proprietary"
            "|unauthorized copying of this file)"),
    )
)  # fmt: skip
_GNU = re.compile(
    f"(?i){_words('GNU ((?:Lesser |Library |Affero )?General Public|Free Documentation) Licen[sc]e')}"
    rf"(?:[^\0]{{0,120}}?{_LATER})?"
)
_REFERS_TO_OTHERS = ("GPL", "LGPL", "AGPL", "MPL", "EPL", "GFDL")
_CREATIVE = re.compile(
    r"creativecommons\.org/(licenses/(by(?:-nc)?(?:-sa|-nd)?)/(\d\.\d)|publicdomain/(zero|mark)/1\.0)"
)
_COPYRIGHT = re.compile(
    r"(?:(?i:copyright)|©|\([cC]\))[ \t]*(©|\([cC]\))?[,: \t]*((?:\d{4}[\d ,–-]*)?[^\d\s\0][^\0\n\r]{2,100})"
)
_RESERVED = re.compile(r"(?i)[ .,;]*all rights reserved\.?")


def has_hint(text: str) -> bool:
    """Whether a text holds any word that speaks of licences."""
    return _HINTS.search(text.encode("latin-1", "replace").lower()) is not None


def is_licence_file(path: str) -> bool:
    """Whether a file is a package's licence, by its name.

    >>> is_licence_file("pkg/LICENSE.txt"), is_licence_file("pkg/licensing.py")
    (True, False)
    """
    name = PurePosixPath(path)
    return (_LICENCE_FILE.match(name.name) is not None and name.suffix != ".py") or "LICENSES" in name.parts[
        :-1
    ]


def is_metadata_file(path: str) -> bool:
    """Whether a file describes a package, by its name."""
    return PurePosixPath(path).name.lower() in _METADATA_FILES


def find(text: str, path: str, classify: bool = False) -> list[Evidence]:
    """What a document says of its licence, best first.

    Args:
        text: the document's.
        path: its path, whose name says whether it is a licence or metadata.
        classify: ask `licenseclassifier` too.

    Raises:
        MissingDependency: it is asked for and not installed.

    >>> [(e.kind, e.licence) for e in find("# SPDX-License-Identifier: MIT OR Apache-2.0", "a.py")]
    [('header', 'Apache-2.0 OR MIT')]
    """
    if not has_hint(text) and not is_licence_file(path):
        return []
    found = [*_headers(text), *(_metadata(text) if is_metadata_file(path) else ())]
    if text.startswith("Format:"):
        found += _debian(text)
    texts = list(_licence_texts(text))
    titles = [e.start for e in texts if e.licence.partition("-")[0] in _REFERS_TO_OTHERS]
    own_end = min(titles, default=len(text))
    words = [*texts, *(e for e in (*_notices(text), *_gnu(text)) if e.start < own_end)]
    if classify and (is_licence_file(path) or words):
        words = _classified(text) or words
    if found and (text.startswith("Format:") or not is_licence_file(path)):
        words = [evidence for evidence in words if evidence.kind == "text"]
    return sorted({*found, *words}, key=lambda evidence: (-evidence.score, evidence.start, evidence.licence))


def _headers(text: str) -> Iterator[Evidence]:
    for match in _SPDX.finditer(text):
        licence = expression_of(match[1].strip())
        if licence:
            yield Evidence("header", licence, 1.0, *match.span())


def _metadata(text: str) -> Iterator[Evidence]:
    for match in _METADATA.finditer(text):
        licence = expression_of(match[1].strip())
        if licence:
            yield Evidence("metadata", licence, 0.95, *match.span(1))
    for match in _CLASSIFIER.finditer(text):
        known = _CLASSIFIERS.get(match[1].strip())
        if known:
            yield Evidence("metadata", known, 0.9, *match.span(1))


def _debian(text: str) -> Iterator[Evidence]:
    """The licences of a machine-readable Debian copyright file."""
    for match in _DEBIAN.finditer(text):
        names = [_debian_name(word) for word in match[1].split()]
        licence = expression_of(" ".join(names))
        if licence:
            yield Evidence("metadata", licence, 0.95, *match.span(1))


def _debian_name(word: str) -> str:
    """A short name of Debian's as SPDX writes it: `GPL-2+` is `GPL-2.0+`, and `Expat` is `MIT`.

    >>> [_debian_name(word) for word in ("GPL-2+", "Expat", "LGPL-2.1", "or", "BSD-3-clause")]
    ['GPL-2.0+', 'MIT', 'LGPL-2.1', 'or', 'BSD-3-clause']
    """
    word = {
        "Expat": "MIT",
        "Expat,": "MIT",
        "PSF": "PSF-2.0",
        "public-domain": "LicenseRef-public-domain",
    }.get(word, word)
    return re.sub(r"^((?:A?L?GPL|GFDL|MPL|Apache|Artistic)-\d)(\+?),?$", r"\1.0\2", word.rstrip(","))


def expression_of(text: str) -> str | None:
    """The normal form of an expression whose licences are all known; None of anything else.

    >>> expression_of("mit"), expression_of("see the file")
    ('MIT', None)
    """
    try:
        expression = spdx.parse(text)
    except spdx.NotAnExpression:
        return None
    known = all(name in spdx.STRICTNESS or name.startswith("LicenseRef-") for name in expression.names)
    return str(expression) if known else None


def _licence_texts(text: str) -> Iterator[Evidence]:
    for licence, pattern in _TEXTS:
        match = pattern.search(text)
        if match:
            yield Evidence("text", licence, 0.9, *match.span())
    match = _BSD.search(text)
    if match:
        has_name, has_advert = _BSD_NAME.search(text, match.end()), _BSD_ADVERT.search(text, match.end())
        clauses = 4 if has_advert else 3 if has_name else 2
        yield Evidence("text", f"BSD-{clauses}-Clause", 0.9, *match.span())


def _notices(text: str) -> Iterator[Evidence]:
    for licence, pattern in _NOTICES:
        match = pattern.search(text)
        if match:
            yield Evidence("notice", licence, 0.9, *match.span())
    for match in _CREATIVE.finditer(text):
        name = (
            f"CC-{match[2].upper()}-{match[3]}"
            if match[2]
            else "CC0-1.0"
            if match[4] == "zero"
            else "CC-PDDC"
        )
        yield Evidence("url", name, 0.6, *match.span())


def _gnu(text: str) -> Iterator[Evidence]:
    """Notices of the GNU licences; which version, and whether later ones may be chosen."""
    for match in _GNU.finditer(text):
        if match[2]:
            family = {"les": "LGPL", "lib": "LGPL", "aff": "AGPL", "fre": "GFDL"}.get(
                match[1][:3].lower(), "GPL"
            )
            licence = f"{family}-{match[2]}.{match[3] or 0}-{'or-later' if match[4] else 'only'}"
            if licence in spdx.STRICTNESS:
                yield Evidence("notice", licence, 0.9, *match.span())


def _classified(text: str) -> list[Evidence]:
    """What `licenseclassifier` recognises."""
    try:
        from licenseclassifier import identify_license
    except ImportError:
        raise MissingDependency(
            "licenseclassifier", extra="licences", needed_for="classifying licences"
        ) from None
    found = identify_license(text, coverage_threshold=0.0)
    share = sum(result.end - result.start for result in found) / max(len(text), 1)
    score = 0.98 if share >= 0.75 else 0.85
    return [
        Evidence("text", licence, score, result.start, result.end)
        for result in found
        if (licence := expression_of(result.id))
    ]


def copyrights(text: str) -> list[str]:
    """The copyright lines of a text, each once, in their order.

    >>> copyrights("# Copyright (c) 2020-2024 Anna B. and others\\n# (C) 2001 by C. D.")
    ['2020-2024 Anna B. and others', '2001 by C. D.']
    """
    if not any(hint in text for hint in ("opyright", "COPYRIGHT", "©", "(c)", "(C)")):
        return []
    found = []
    for match in _COPYRIGHT.finditer(text):
        line = _RESERVED.sub("", match[2]).strip(" \t*#/-")
        is_statement = line[:4].isdigit() or (line[:1].isupper() and (match[1] or _RESERVED.search(match[2])))
        if is_statement and len(line) > 4:
            found.append(line)
    return list(dict.fromkeys(found))


def conclude(evidence: Sequence[Evidence]) -> tuple[str | None, float, bool]:
    """The licence that evidence adds up to, how sure it is, and whether it disagrees with itself.

    The best kind of evidence decides; several licences of that kind are all asked for (AND). Evidence of
    other kinds disagrees where it names a licence that is not among them.
    """
    if not evidence:
        return None, 0.0, False
    best = max(item.score for item in evidence)
    chosen = [spdx.parse(item.licence) for item in evidence if item.score == best]
    joined = spdx.join(chosen)
    assert joined is not None
    families = {_family(name) for name in joined.names}
    others = {_family(name) for item in evidence for name in spdx.parse(item.licence).names}
    return str(joined), best, not others <= families


def _family(name: str) -> str:
    """A licence's name without its version: a notice often leaves it open."""
    return re.sub(r"-\d[\w.]*(?:-only|-or-later)?$", "", name)
