"""Docstrings of this project as Markdown: indented lines are equations or tables, everything else is prose."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
SPECIAL = re.compile(r"([\\*_\[\]<>#|~])")
INDENT = "    "


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown. Lines with an indentation of four become a code block, arXiv numbers become links."""
    blocks = []
    for equations, lines in groupby(inspect.cleandoc(docstring or "").splitlines(), _is_indented):
        text = "\n".join(lines)
        blocks.append(code(inspect.cleandoc("\n" + text), "text") if equations else prose(text))
    return "\n\n".join(block for block in blocks if block.strip())


def _is_indented(line: str) -> bool:
    return line.startswith(INDENT)


def prose(text: str) -> str:
    """Text outside backticks with its special characters escaped, and with links to arXiv."""
    parts = re.split(r"(`[^`]*`)", text.strip("\n"))
    return "".join(part if part.startswith("`") else _escape(part) for part in parts)


def _escape(text: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", SPECIAL.sub(r"\\\1", text))


def code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown on one line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines)


def toctree(names: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])
