"""`lra list` and the table of `lra data list`: architectures and tasks in 80 columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lra.api import list_architectures
from lra.cli.common import console, guarded
from lra.errors import UserError, unknown
from lra.registry import architectures, tasks

WIDTH = 80
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@guarded
def list_(
    pattern: Annotated[str, typer.Argument(help="Pattern of architecture names, such as '*former*' or 's4d/*'.")] = "*",
    family: Annotated[str, typer.Option(metavar="NAME", help="Only architectures of this family.")] = "",
    as_json: AsJson = False,
) -> None:
    """List architectures and, if neither pattern nor family is given, tasks."""
    names = list_architectures(pattern)
    families = sorted({architectures.family(name) for name in architectures.names()})
    family = family.replace("-", "_") if family.replace("-", "_") in families else family
    if family and family not in families:
        raise unknown("family", family, families)
    facts = architectures.all_facts()
    cards = [facts[name.partition("/")[0]] | {"name": name} for name in names]
    cards = [card for card in cards if not family or card["family"] == family]
    if not cards:
        raise _nothing(pattern, family)
    known = tasks.all_facts() if pattern == "*" and not family else {}
    entries = [known[name] for name in sorted(known)]
    if as_json:
        print(json.dumps({"architectures": cards, "tasks": entries}, indent=1, sort_keys=True))
        return
    rows = []
    for card in cards:
        more = f" +{len(card['variants'])}" if card["variants"] and "/" not in card["name"] else ""
        declared = [str(card.get(key, "?")) for key in ("family", "scaling", "direction")]
        recurrent = "?" if card.get("recurrent") is None else "yes" if card["recurrent"] else ""
        rows.append([card["name"] + more, *declared, recurrent, str(card.get("year") or "?")])
    show_table(("name", "family", "work", "direction", "recurrent", "year"), rows, right=("year",))
    example = next((card["name"] for card in cards if card["variants"] and "/" not in card["name"]), "")
    if example:
        console.print(f"+n: number of variants; `lra list '{example}/*'` lists them", soft_wrap=True)
    for card in cards:
        if "problem" in card:
            console.print(f"{card['name']}: {card['problem']}", soft_wrap=True, markup=False)
    console.print("papers: `lra list --json`", soft_wrap=True)
    if entries:
        console.print()
        rows = [[str(entry.get(k, "?")) for k in ("name", "title", "family", "classes")] for entry in entries]
        show_table(("task", "title", "family", "classes"), rows, right=("classes",))
        console.print("lengths, protocols and sizes: `lra data list`", soft_wrap=True)


def _nothing(pattern: str, family: str) -> UserError:
    """The error of a pattern that matches nothing; it suggests the nearest name if the pattern is a name."""
    if not set(pattern) & set("*?["):
        return unknown("architecture", pattern, architectures.names(variants="/" in pattern))
    where = f" in the family {family}" if family else ""
    return UserError(f"no architecture{where} matches {pattern!r}; `lra list` shows all names")


def match_tasks(pattern: str) -> list[str]:
    """Names of the tasks that match a pattern. Raises UserError if there are none."""
    names = [name for name in tasks.names() if fnmatchcase(name, pattern)]
    if not names:
        raise unknown("task", pattern, tasks.names())
    return names


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table: with colours and a title row on a terminal, plain text elsewhere. No cell is cut or wrapped."""
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        gap = "  " if sum(widths) + 2 * len(widths) - 2 <= WIDTH else " "
        for row in (columns, *rows):
            cells = [
                cell.rjust(width) if column in right else cell.ljust(width)
                for cell, column, width in zip(row, columns, widths, strict=True)
            ]
            print(gap.join(cells).rstrip())
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def size_text(size: int | None) -> str:
    """Bytes in about three digits, "12 MB"; a dash for None."""
    if size is None:
        return "-"
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 100 else f"{value:,.0f} {units[0]}"
