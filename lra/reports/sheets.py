"""A table as data, and its forms: terminal, Markdown, LaTeX, HTML. Text is escaped here and nowhere else."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

WORDS = ("architecture", "task", "direction", "note", "source", "differs in", "protocol")
"""Columns that hold words and are set flush left; the others hold numbers."""


@dataclass(frozen=True)
class Cell:
    """place: 1 for the best of its column, 2 for the second, 0 for the rest."""

    text: str
    place: int = 0


@dataclass(frozen=True)
class Sheet:
    """title; columns; rows of cells, one per column; notes below; hidden: columns the narrow terminal leaves out."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    hidden: frozenset[str] = field(default_factory=frozenset)


def terminal(sheet: Sheet) -> Table:
    """For 100 columns; the best bold, the second underlined. A column in which no row says anything is left out."""
    table = Table(title=escape(sheet.title), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    said = [not sheet.rows or any(row[i].text != "-" for row in sheet.rows) for i in range(len(sheet.columns))]
    kept = [i for i, name in enumerate(sheet.columns) if name not in sheet.hidden and said[i]]
    for i in kept:
        name = sheet.columns[i]
        words = name in WORDS
        least = min(16, max((len(row[i].text) for row in sheet.rows), default=0)) if words else None
        table.add_column(
            name, justify="left" if words else "right", no_wrap=not words, overflow="fold", min_width=least
        )
    styles = ("{}", "[bold]{}[/]", "[underline]{}[/]")
    for row in sheet.rows:
        table.add_row(*(styles[row[i].place].format(escape(row[i].text)) for i in kept))
    return table


def markdown(sheet: Sheet) -> str:
    return f"## {plain(sheet.title)}\n\n{markdown_body(sheet)}"


def markdown_body(sheet: Sheet) -> str:
    """Without the title."""
    lines = [_row([plain(c) for c in sheet.columns])]
    lines.append("|" + "|".join("---" if c in WORDS else "---:" for c in sheet.columns) + "|")
    forms = ("{}", "**{}**", "<u>{}</u>")
    lines += [_row([forms[c.place].format(plain(c.text)) for c in row]) for row in sheet.rows]
    return "\n".join([*lines, "", *(line for note in sheet.notes for line in (plain(note), ""))])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plain(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≤": r"$\leq$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "−": "$-$",
}  # fmt: skip


def latex(sheet: Sheet) -> str:
    """A booktabs table: \\usepackage{booktabs}. Best bold, second underlined."""
    align = "".join("l" if c in WORDS else "r" for c in sheet.columns)
    forms = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")
    body = [" & ".join(forms[c.place].format(_tex(c.text)) for c in row) + r" \\" for row in sheet.rows]
    note = " ".join(_tex(n) if n.endswith(".") else f"{_tex(n)}." for n in sheet.notes)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{_tex(sheet.title)}. {note}}}".replace(". }", ".}"),
        # small enough for the text width of an article
        r"\footnotesize\setlength{\tabcolsep}{3pt}", rf"\begin{{tabular}}{{{align}}}",
        r"\toprule", " & ".join(map(_tex, sheet.columns)) + r" \\", r"\midrule",
        *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda m: LATEX[m[0]], text.replace("\n", " "))


def page(title: str, intro: str, sheets: Sequence[Sheet]) -> str:
    """One HTML file with every sheet, no script and nothing fetched."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(intro)}</p>"]
    for sheet in sheets:
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in sheet.columns)
        body = "".join("<tr>" + "".join(map(_cell, row, sheet.columns)) + "</tr>\n" for row in sheet.rows)
        parts.append(f"<h2>{html.escape(sheet.title)}</h2>\n<div><table>\n<tr>{head}</tr>\n{body}</table></div>")
        parts += [f"<p>{html.escape(note)}</p>" for note in sheet.notes]
    return f"{HEAD.format(html.escape(title))}{chr(10).join(parts)}\n</body></html>\n"


def _cell(cell: Cell, column: str) -> str:
    name, text = ' class="w"' if column in WORDS else "", html.escape(cell.text)
    return f"<td{name}>{('{}', '<b>{}</b>', '<u>{}</u>')[cell.place].format(text)}</td>"


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{}</title>
<style>
:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em;
padding: 0 1em }} div {{ overflow-x: auto }} table {{ border-collapse: collapse }} h2 {{ font-size: 1.1em }}
td, th {{ padding: .2em .6em; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }}
td.w, th:first-child {{ text-align: left }}
</style></head><body>
"""
