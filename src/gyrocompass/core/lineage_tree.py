"""A lineage drawn as a tree on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gyrocompass.core.config import canonical_json
from gyrocompass.core.lineage_graph import DocumentFacts, Lineage, Node

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree


def render(lineage: Lineage) -> Tree:
    """A tree for the terminal: what it is, where it came from, what came of it."""
    from rich.text import Text
    from rich.tree import Tree

    if lineage.artifact is not None:
        tree = Tree(_headline(lineage.artifact))
        _add_facts(tree, lineage.artifact, recipe=True)
        made_from = tree.add(Text("made from", style="bold"))
        for link in lineage.artifact.links:
            _add_node(made_from, link, facts=True)
        below = tree.add(Text("used by", style="bold"))
    else:
        assert lineage.document is not None
        tree = Tree(_document_line(lineage.document))
        made_from = tree.add(Text("derived from", style="bold"))
        _add_origins(made_from, lineage.document)
        below = tree.add(Text(f"listed by ({len(lineage.saw)} artifacts saw it)", style="bold"))
    for link in lineage.down:
        _add_node(below, link, facts=False)
    for branch in (made_from, below):
        if not branch.children:
            branch.add(Text("nothing", style="dim"))
    return tree


def _add_node(tree: Tree, node: Node, *, facts: bool) -> None:
    branch = tree.add(_headline(node))
    if facts:
        _add_facts(branch, node, recipe=False)
    for link in node.links:
        _add_node(branch, link, facts=facts)


def _add_facts(tree: Tree, node: Node, *, recipe: bool) -> None:
    """The lines about an artifact: code, counts, documents by source and slice, recipe."""
    from rich.text import Text

    if node.kind is None or node.again:
        return
    lines = [f"made {node.created_at} by code {node.code_version}"]
    if node.counts:
        lines.append(", ".join(f"{name} {count:,}" for name, count in sorted(node.counts.items())))
    lines += [
        f"{entry.documents:,} documents {entry.status}: {entry.source}, {entry.slice}"
        for entry in node.documents
    ]
    if recipe:
        lines.append(f"recipe {canonical_json(node.recipe)}")
    for line in lines:
        tree.add(Text(line, style="dim"))


def _add_origins(tree: Tree, document: DocumentFacts) -> None:
    for origin in document.origins:
        _add_origins(tree.add(_document_line(origin)), origin)


def _headline(node: Node) -> Text:
    from rich.text import Text

    line = Text(f"{node.role}: " if node.role else "", style="cyan")
    line.append(node.id, style="bold")
    if node.kind is None:
        line.append(" (from another store)", style="dim")
    if node.measured_only:
        line.append(" (held out: measured, not learned from)", style="green")
    if node.again:
        line.append(" (continued elsewhere in this tree)", style="dim")
    return line


def _document_line(document: DocumentFacts) -> Text:
    from rich.text import Text

    line = Text(document.id, style="bold")
    line.append(
        f" {document.path} ({document.source})" if document.path else " (not listed here)", style="dim"
    )
    return line
