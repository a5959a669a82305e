from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.dep5 import common_licences, parse, spdx

GIT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Contact: someone
# a comment

Files: *
Copyright: 2005-2022, A and others
License: GPL-2

Files: contrib/persistent/*
 contrib/wc?.py
Copyright: 2018, B
License: Expat
 Permission is hereby granted,
 .
 free of charge

Files: debian/*
Copyright: 2020, C
License: GPL-2+

License: GPL-2
 On Debian systems see /usr/share/common-licenses/GPL-2.
"""


def test_the_last_stanza_that_matches_a_path_holds() -> None:
    found = parse(GIT)
    assert found is not None and [stanza.licence for stanza in found.stanzas] == ["GPL-2", "Expat", "GPL-2+"]
    assert found.stanzas[1].line == 9

    def licence(*paths: str) -> str | None:
        stanza = found.licence(paths)
        return stanza.licence if stanza else None

    assert licence("README") == "GPL-2"
    assert licence("contrib/persistent/https/x") == "Expat"
    assert licence("contrib/wc1.py") == "Expat" and licence("contrib/wc12.py") == "GPL-2"
    assert licence("nowhere", "debian/README") == "GPL-2+", "the first path that is spoken of specifically"


@pytest.mark.parametrize(
    ("short", "expression"),
    [
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-2+", "GPL-2.0-or-later"),
        ("GPL-3.0+", "GPL-3.0-or-later"),
        ("LGPL-2.1+", "LGPL-2.1-or-later"),
        ("GFDL-1.3", "GFDL-1.3-only"),
        ("GFDL-NIV-1.2+", "GFDL-1.2-no-invariants-or-later"),
        ("Expat", "MIT"),
        ("CC-BY-SA-3.0", "CC-BY-SA-3.0"),
        ("GPL-1+ or Artistic", "GPL-1.0-or-later OR Artistic-1.0-Perl"),
        ("GPL-2+ and LGPL-2.1+", "GPL-2.0-or-later AND LGPL-2.1-or-later"),
        ("GPL-2+ or Artistic-2.0, and BSD-3-clause", "(GPL-2.0-or-later OR Artistic-2.0) AND BSD-3-Clause"),
        ("GPL-2+ with Autoconf exception", "GPL-2.0-or-later WITH Autoconf-exception-2.0"),
        ("GPL-2+ with a curious exception", None),
        ("public-domain", None),
        ("GPL-2 and unknown", None),
    ],
)
def test_short_names_as_spdx(short: str, expression: str | None) -> None:
    assert spdx(short) == expression


def test_copyright_files_in_free_words() -> None:
    text = "It is GPL; see /usr/share/common-licenses/GPL-2 and\n`/usr/share/common-licenses/LGPL-2.1'."
    assert parse(text) is None
    assert common_licences(text) == ("GPL-2", "LGPL-2.1")
    assert parse("Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n") is None


@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    parse("Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: " + text)
    spdx(text)
