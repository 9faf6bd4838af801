"""A table for people, and its forms: terminal, Markdown, LaTeX, HTML. Text is escaped here and nowhere else."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table as RichTable

if TYPE_CHECKING:
    import pandas as pd

WORDS = (
    "architecture", "task", "direction", "note", "source", "differs in", "protocol", "recipe", "settings", "field",
    "first", "second",
)  # fmt: skip
"""Columns that hold words and are aligned left; the others hold numbers."""


@dataclass(frozen=True)
class TableCell:
    """place: 1 for the best of its column, 2 for the second best, 0 for the rest."""

    text: str
    place: int = 0


@dataclass(frozen=True)
class Table:
    """title; columns; rows with one cell for each column; notes below the table; hidden: columns that the terminal,
    which is narrow, leaves out; grey: numbers of rows that HTML shows in grey."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    notes: Sequence[str] = ()
    hidden: frozenset[str] = field(default_factory=frozenset)
    grey: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The cells as a DataFrame of TableCell."""
        import pandas as pd

        return pd.DataFrame([list(row) for row in self.rows], columns=list(self.columns), dtype=object)

    def texts(self, forms: Sequence[str], escaped: Callable[[str], str]) -> Iterator[tuple[str, ...]]:
        """The rows as text. forms: format strings for cells of place 0, 1 and 2."""
        texts = self.frame.map(lambda cell: forms[cell.place].format(escaped(cell.text)))
        return texts.itertuples(index=False, name=None)


def terminal(table: Table) -> RichTable:
    """For 100 columns; the best value bold, the second best underlined. Columns without any value are left out."""
    shown = RichTable(title=escape(table.title), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    lengths = table.frame.map(lambda cell: 0 if cell.text == "-" else len(cell.text)).max()
    kept = [name for name in table.columns if name not in table.hidden and (not table.rows or lengths[name])]
    for name in kept:
        words = name in WORDS
        least = min(16, int(lengths[name]) if table.rows else 0) if words else None
        shown.add_column(
            name, justify="left" if words else "right", no_wrap=not words, overflow="fold", min_width=least
        )
    for row in table.texts(("{}", "[bold]{}[/]", "[underline]{}[/]"), escape):
        shown.add_row(*(text for name, text in zip(table.columns, row, strict=True) if name in kept))
    return shown


def markdown(table: Table) -> str:
    return f"## {plain(table.title)}\n\n{markdown_body(table)}"


def markdown_body(table: Table) -> str:
    """Without the title."""
    lines = [_row([plain(c) for c in table.columns])]
    lines.append("|" + "|".join("---" if c in WORDS else "---:" for c in table.columns) + "|")
    lines += [_row(row) for row in table.texts(("{}", "**{}**", "<u>{}</u>"), plain)]
    return "\n".join([*lines, "", *(line for note in table.notes for line in (plain(note), ""))])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plain(text: str) -> str:
    """Text as Markdown shows it literally."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≤": r"$\leq$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "−": "$-$",
}  # fmt: skip


def latex(table: Table) -> str:
    """A booktabs table: \\usepackage{booktabs}. The best value bold, the second best underlined."""
    align = "".join("l" if c in WORDS else "r" for c in table.columns)
    body = [" & ".join(row) + r" \\" for row in table.texts(("{}", r"\textbf{{{}}}", r"\underline{{{}}}"), _tex)]
    note = " ".join(_tex(n) if n.endswith(".") else f"{_tex(n)}." for n in table.notes)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.title)}. {note}}}".replace(". }", ".}"),
        # small enough for the text width of an article
        r"\footnotesize\setlength{\tabcolsep}{3pt}", rf"\begin{{tabular}}{{{align}}}",
        r"\toprule", " & ".join(map(_tex, table.columns)) + r" \\", r"\midrule",
        *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda m: LATEX[m[0]], text.replace("\n", " "))


def page(title: str, intro: str, tables: Sequence[Table]) -> str:
    """One HTML file with all tables; it has no script and loads nothing."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(intro)}</p>"]
    for table in tables:
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in table.columns)
        classes = [' class="w"' if c in WORDS else "" for c in table.columns]
        rows = table.texts(("{}", "<b>{}</b>", "<u>{}</u>"), html.escape)
        lines = ["".join(f"<td{c}>{text}</td>" for c, text in zip(classes, row, strict=True)) for row in rows]
        kinds = [' class="grey"' if number in table.grey else "" for number in range(len(lines))]
        body = "".join(f"<tr{kind}>{line}</tr>\n" for kind, line in zip(kinds, lines, strict=True))
        parts.append(f"<h2>{html.escape(table.title)}</h2>\n<div><table>\n<tr>{head}</tr>\n{body}</table></div>")
        parts += [f"<p>{html.escape(note)}</p>" for note in table.notes]
    return f"{HEAD.format(html.escape(title))}{chr(10).join(parts)}\n</body></html>\n"


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{}</title>
<style>
:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em;
padding: 0 1em }} div {{ overflow-x: auto }} table {{ border-collapse: collapse }} h2 {{ font-size: 1.1em }}
td, th {{ padding: .2em .6em; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }}
td.w, th:first-child {{ text-align: left }} .grey {{ color: #888 }}
</style></head><body>
"""
