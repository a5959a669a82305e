"""The programming language of files: by name, by first line, else by the words that only one language has.

    path, text --CodeLanguage--> label "python", score, comments

A file name decides (.95), then a `#!` line or an editor's mode line (.9). Without either the text is searched
for constructs; the language with the most of them is named if it has clearly more than any other, with a
score that says by how much. A text that none fits is prose or data, and gets a null.

`comments` is the share of lines that are comments, where the language's are known. Left out: languages within
languages, such as scripts in HTML.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np
import pyarrow as pa

from gyrocompass.data.curate.step import RecordStep, register

_SUFFIXES = {
    "python": "py pyi pyx pxd pyw", "c": "c", "c++": "cc cpp cxx hpp hh hxx ipp", "c-header": "h", "c#": "cs",
    "java": "java", "javascript": "js mjs cjs jsx", "typescript": "ts tsx mts", "go": "go", "rust": "rs",
    "ruby": "rb rake gemspec", "php": "php", "perl": "pl pm t", "shell": "sh bash zsh ksh fish",
    "powershell": "ps1 psm1", "sql": "sql", "html": "html htm xhtml", "css": "css scss sass less",
    "xml": "xml xsd xsl svg", "json": "json jsonl ipynb", "yaml": "yaml yml", "toml": "toml",
    "ini": "ini cfg conf", "markdown": "md markdown", "restructuredtext": "rst", "latex": "tex sty cls",
    "r": "r rmd", "julia": "jl", "scala": "scala sc", "kotlin": "kt kts", "swift": "swift",
    "objective-c": "m mm", "haskell": "hs lhs", "ocaml": "ml mli", "f#": "fs fsx", "erlang": "erl hrl",
    "elixir": "ex exs", "clojure": "clj cljs cljc edn", "lisp": "lisp lsp el", "scheme": "scm ss rkt",
    "lua": "lua", "dart": "dart", "fortran": "f f77 f90 f95 f03", "cobol": "cob cbl", "pascal": "pas pp",
    "ada": "adb ads", "assembly": "s asm", "verilog": "v sv vh", "vhdl": "vhd vhdl", "cmake": "cmake",
    "make": "mk mak", "groovy": "groovy gradle", "tcl": "tcl", "zig": "zig", "nim": "nim",
    "protobuf": "proto", "graphql": "graphql gql", "terraform": "tf tfvars", "roff": "1 3 5 7 8 man",
    "diff": "diff patch", "csv": "csv tsv", "batch": "bat cmd", "vim": "vim",
}  # fmt: skip
_NAMES = {
    "makefile": "make", "gnumakefile": "make", "dockerfile": "dockerfile", "cmakelists.txt": "cmake",
    "rakefile": "ruby", "gemfile": "ruby", "jenkinsfile": "groovy", "build": "starlark",
    "workspace": "starlark", ".bashrc": "shell", ".profile": "shell", "pkgbuild": "shell",
    "cargo.lock": "toml", "pipfile": "toml",
}  # fmt: skip
_INTERPRETERS = {
    "python": "python", "sh": "shell", "bash": "shell", "zsh": "shell", "dash": "shell", "ksh": "shell",
    "perl": "perl", "ruby": "ruby", "node": "javascript", "php": "php", "lua": "lua", "tclsh": "tcl",
    "rscript": "r", "awk": "awk",
}  # fmt: skip
_COMMENTS = {
    "#": "python ruby perl shell r julia yaml toml make cmake dockerfile elixir nim tcl powershell "
        "starlark terraform",
    "//": "c c++ c-header c# java javascript typescript go rust php scala kotlin swift objective-c dart "
        "zig groovy protobuf",
    "--": "sql haskell lua ada vhdl", ";": "lisp scheme clojure assembly ini", "%": "latex erlang",
    '"': "vim",
}  # fmt: skip

_MODE_LINE = re.compile(r"-\*-\s*(?:mode:\s*)?([\w+#-]+)\s*(?:;|-\*-)|vim?:.*?\b(?:ft|filetype)=(\w+)")
_CONSTRUCTS = {
    "python": r"^\s*(?:def \w+\(.*\).*:|class \w+.*:|from [\w.]+ import |import \w+(?:\.\w+)*(?: as \w+)?$"
        r"|elif .+:|if __name__ ==|(?:try|else|finally):$|except\b.*:$|with .+ as \w+:|raise [A-Z]\w+"
        r"|@\w+(?:\.\w+)*$|self\.\w+ = |for \w.* in .+:$)",
    "c": r"^\s*(?:#\s*include\s*[<\"]|#\s*(?:define|ifdef|ifndef|endif)\b|(?:static |extern |const )*(?:int"
        r"|void|char|double|size_t|struct \w+) \*?\w+\([^;]*\)\s*\{?$|typedef )",
    "c++": r"^\s*(?:template\s*<|namespace \w+|using namespace |class \w+ (?:final )?(?::|\{)|public:"
        r"|private:|std::|#include <\w+>$)|std::\w+",
    "java": r"^\s*(?:package [\w.]+;|import (?:static )?[\w.]+(?:\.\*)?;|(?:public|private|protected) "
        r"(?:static |final |abstract )*(?:class|interface|enum|void|[A-Z]\w*)\b|@Override)",
    "javascript": r"^\s*(?:(?:const|let|var) \w+ = |function \w*\(|export (?:default|const|function)"
        r"|import .+ from ['\"]|module\.exports|require\()|=>\s*\{|console\.log\(",
    "typescript": r"^\s*(?:(?:export )?interface \w+|(?:export )?type \w+ = |import type )|: (?:string"
        r"|number|boolean)(?:\[\])?[;,)=]",
    "go": r"^(?:package \w+$|func (?:\(\w+ \*?\w+\) )?\w+\(|import \(|type \w+ (?:struct|interface) \{)|:= "
        r"|\bfmt\.",
    "rust": r"^\s*(?:(?:pub )?fn \w+|use [\w:]+(?:::\{|;)|impl(?:<.*>)? \w+|(?:pub )?(?:struct|enum|mod"
        r"|trait) \w+|#\[\w+|let mut )|println!\(",
    "shell": r"^\s*(?:if \[\[? .+ \]\]?; then|fi$|done$|esac$|for \w+ in .+; do|export \w+=|echo ['\"$])"
        r"|\$\{\w+[:}%#-]|\$\(\w+",
    "ruby": r"^\s*(?:require ['\"]|def \w+[?!]?(?:\(.*\))?$|end$|module [A-Z]\w*|class [A-Z]\w*(?: < "
        r"[A-Z]\w*)?$|attr_\w+ :|puts )|\bdo \|\w+",
    "php": r"<\?php|^\s*(?:\$\w+ = |function \w+\(.*\$|namespace [\w\\]+;|use [\w\\]+;|echo \$)",
    "sql": r"(?i)^\s*(?:select .+ from |insert into |create (?:table|index|view) |update \w+ set |alter "
        r"table |delete from |drop table )",
    "html": r"(?i)<!doctype html|</?(?:html|head|body|div|span|table|script|ul|li|p|a)\b[^>]*>",
    "css": r"^\s*(?:[.#]?[\w-]+(?:[ ,.#:>][\w-]+)*\s*\{$|[a-z-]+:\s*[^;{}]+;$|@media )",
    "latex": r"\\(?:documentclass|usepackage|begin|end|section|subsection|cite|ref|label)\{",
    "haskell": r"^(?:module [A-Z][\w.]* |import (?:qualified )?[A-Z][\w.]*|\w+ :: .+->|data [A-Z]\w* ="
        r"|instance )",
    "perl": r"^\s*(?:use (?:strict|warnings);|my [$@%]\w+|sub \w+\s*\{|package [\w:]+;)|[$@]_\b|=~ [ms]?/",
    "lua": r"^\s*(?:local (?:function )?\w+|function [\w.:]+\(.*\)$|end$|return \w+$)|\bthen$",
    "json": r"^\s*(?:\"[\w$ -]+\"\s*:|[\[{]$|[\]}],?$)",
    "xml": r"^\s*(?:<\?xml |</?[\w-]+:[\w-]+)",
}  # fmt: skip


@register
class CodeLanguage(RecordStep):
    """Names the programming language of each document."""

    name: ClassVar[str] = "code_language"

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`label`, `score` and `comments`; null where a text is no code that is known."""
        rows = zip(documents.column("path").to_pylist(), documents.column("text").to_pylist(), strict=True)
        found = [(*identify(path, text), text) for path, text in rows]
        return pa.RecordBatch.from_pydict(
            {
                "id": documents.column("id"),
                "label": pa.array([label for label, _, _ in found], pa.string()),
                "score": pa.array([score for _, score, _ in found], pa.float32()),
                "comments": pa.array([comment_share(text, label) for label, _, text in found], pa.float32()),
            }
        )


@cache
def _by_suffix() -> dict[str, str]:
    return {suffix: language for language, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {language: re.compile(pattern, re.MULTILINE) for language, pattern in _CONSTRUCTS.items()}


@cache
def _comment_signs() -> dict[str, str]:
    return {language: sign for sign, languages in _COMMENTS.items() for language in languages.split()}


def identify(path: str, text: str) -> tuple[str | None, float]:
    """The language of a file and how sure that is.

    >>> identify("a/setup.py", ""), identify("run", "#!/usr/bin/env bash\\n"), identify("notes", "Dear Anna,")
    (('python', 0.95), ('shell', 0.9), (None, 0.0))
    """
    name = PurePosixPath(path).name.lower()
    label = _NAMES.get(name) or _by_suffix().get(PurePosixPath(name).suffix.lstrip("."))
    if label == "c-header":
        return ("c++" if _patterns()["c++"].search(text[:4000]) else "c"), 0.95
    if label:
        return label, 0.95
    return _by_first_lines(text) or _by_constructs(text)


def _by_first_lines(text: str) -> tuple[str, float] | None:
    head = text[:200].split("\n", 2)[:2]
    if head[0].startswith("#!"):
        words = re.split(r"[/\s]+", head[0][2:])
        for word in words:
            language = _INTERPRETERS.get(re.sub(r"[\d.]+$", "", word))
            if language:
                return language, 0.9
    match = _MODE_LINE.search("\n".join(head))
    mode = (match[1] or match[2] or "").lower() if match else ""
    return (mode, 0.9) if mode in _SUFFIXES else None


def _by_constructs(text: str) -> tuple[str | None, float]:
    head = text[:8000]
    if not any(sign in head for sign in '{}()<>;=\\$":'):
        return None, 0.0
    n_lines = head.count("\n") + 1
    counts = sorted(
        ((sum(1 for _ in pattern.finditer(head)), language) for language, pattern in _patterns().items()),
        reverse=True,
    )
    (best, label), (second, _) = counts[0], counts[1]
    if best < max(2, 0.03 * n_lines) or best < 1.2 * second:
        return None, 0.0
    return label, round(0.85 * (1 - second / (best + 1)), 3)


def comment_share(text: str, label: str | None) -> float | None:
    """The share of lines that begin with the language's sign of comments; None where none is known.

    >>> comment_share("# a\\nx = 1\\n\\n# b", "python")
    0.6666666666666666
    """
    sign = _comment_signs().get(label or "")
    if sign is None:
        return None
    lines = [line for line in map(str.lstrip, text.split("\n")) if line]
    return float(np.mean([line.startswith(sign) for line in lines])) if lines else 0.0
