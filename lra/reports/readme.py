"""The generated parts of the README: the results, and the architectures by family."""

from __future__ import annotations

from pathlib import Path

from lra import files
from lra.encoder import FAMILIES, SCALINGS
from lra.registry import architectures
from lra.reports import leaderboard
from lra.reports.ranking import Leaderboard


def sections(board: Leaderboard) -> dict[str, str]:
    """The text between the markers `<!-- name -->` and `<!-- /name -->`, by name."""
    return {"results": leaderboard.readme(board), "architectures": architecture_table()}


def architecture_table() -> str:
    """A row for each family: its architectures by growth of work, linked to their papers."""
    cards = [architectures.facts(name) for name in architectures.names() if architectures.family(name) in FAMILIES]
    lines = ["| family | work: architectures |", "|---|---|"]
    for family in FAMILIES:
        groups = []
        for scaling in SCALINGS:
            chosen = [card for card in cards if (card["family"], card["scaling"]) == (family, scaling)]
            links = ", ".join(f"[{card['name']}]({card['url']})" for card in chosen)
            groups += [f"**{scaling}**: {links}"] if links else []
        lines += [f"| {family.replace('_', ' ')} | {'; '.join(groups)} |"] if groups else []
    return "\n".join(lines)


def update(path: Path, board: Leaderboard) -> list[str]:
    """Replace the text between the markers of a README. Returns the names of the sections that it has."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    replaced = []
    for name, content in sections(board).items():
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if end:
            text = f"{before}{start}\n{content}\n{end}{after}"
            replaced.append(name)
    if replaced:
        with files.atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return replaced
