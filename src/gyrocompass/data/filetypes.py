"""What a file's name says about its contents."""

from __future__ import annotations

CODE_LANGUAGES = {
    suffix: language
    for language, suffixes in {
        "bash": ".sh .bash",
        "c": ".c .h",
        "c++": ".cc .cpp .cxx .hh .hpp .cu .cuh",
        "c#": ".cs",
        "css": ".css",
        "fortran": ".f90",
        "go": ".go",
        "haskell": ".hs",
        "java": ".java",
        "javascript": ".js .jsx .mjs",
        "julia": ".jl",
        "kotlin": ".kt",
        "lua": ".lua",
        "perl": ".pl .pm",
        "php": ".php",
        "python": ".py .pyi",
        "r": ".r",
        "ruby": ".rb",
        "rust": ".rs",
        "scala": ".scala",
        "sql": ".sql",
        "swift": ".swift",
        "typescript": ".ts .tsx",
        "zig": ".zig",
    }.items()
    for suffix in suffixes.split()
}
TEXT_SUFFIXES = {".md", ".rst", ".tex", ".txt"}
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)

CODE_NAMES = {
    "cmakelists.txt": "cmake",
    "containerfile": "dockerfile",
    "dockerfile": "dockerfile",
    "gnumakefile": "make",
    "makefile": "make",
    "rakefile": "ruby",
}
"""Files that are code by their whole name, in small letters."""
INTERPRETERS = {
    "bash": "bash",
    "dash": "bash",
    "node": "javascript",
    "perl": "perl",
    "php": "php",
    "python": "python",
    "rscript": "r",
    "ruby": "ruby",
    "sh": "bash",
}
"""What a script's first line runs it with, and what it is written in then."""
