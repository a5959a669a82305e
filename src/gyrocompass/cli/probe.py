"""`gyro doctor URL`: what silently ruins the log-likelihoods of a server."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from gyrocompass.core.errors import MissingDependency


def probe_server(options: argparse.Namespace) -> int:
    """Ask the server, and show each check; 1 where one is wrong."""
    try:
        from gyrocompass.serve.probe import probe
    except ImportError as error:
        raise MissingDependency(error.name or "httpx", extra="serve", needed_for="gyro doctor URL") from error
    found = probe(options.url, model=options.model, api_key_env=options.key_env)
    if options.json:
        print(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        table = Table()
        for head in ("", "check", "seen"):
            table.add_column(head)
        styles = {"right": "green", "wrong": "bold red", "absent": "yellow"}
        for finding in found:
            verdict = f"[{styles[finding.verdict]}]{finding.verdict}[/]"
            table.add_row(verdict, finding.name, finding.detail.replace("[", "\\["))
        Console(highlight=False).print(table)
    return int(any(finding.verdict == "wrong" for finding in found))
