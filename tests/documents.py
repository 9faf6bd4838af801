"""What documents of this project contain: snippets, commands, files and links, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer
from typer.main import get_command

from lra.cli.app import app

ROOT = Path(__file__).parents[1]
TINY = f"{Path(__file__).with_name('tiny_task.py')}:Tiny"
SMALL = {"train.steps": 4, "train.evaluate_every": 4, "model.d_model": 8}
# typer does not export it, and where it lives depends on the release
USAGE_ERROR = typer.BadParameter.__mro__[1]


def blocks(language: str, text: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for named, block in fenced if named == language]


def files(text: str) -> dict[str, str]:
    """The blocks that are files, by name: those after a line that ends with "a file `name`:"."""
    return dict(re.findall(r"\ba file `([\w.]+)`:\n\n```\w+\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


def shell_lines(text: str) -> list[str]:
    """The commands of the shell blocks, without comments, variables, redirection and the environment's folder."""
    lines = [line for block in blocks("bash", text) for line in block.splitlines()]
    lines = [re.split(" > |#", line)[0].strip() for line in lines]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?", "", line) for line in lines if line]


def mentions(program: str, text: str) -> list[str]:
    """Every use of `program` in backticks."""
    found = [line.removeprefix(".venv/bin/") for line in re.findall(r"`([^`\n]+)`", text)]
    return [line for line in found if line.startswith(f"{program} ")]


def of(program: str, lines: list[str]) -> list[str]:
    return sorted({line for line in lines if line.startswith(f"{program} ")})


def parse(command: str) -> None:
    """What the command line would make of `command`, short of doing it. A bare name only has to exist."""
    parser, words = get_command(app), shlex.split(command)[1:]
    while hasattr(parser, "commands"):
        parser, words = parser.commands[words[0]], words[1:]
    if words:
        parser.make_context("lra", words)


def links(text: str) -> list[str]:
    """The targets of the links to other documents, without those to the web and with their anchors cut off."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)]


def small(snippet: str) -> str:
    """A snippet with the tests' own task in place of those of the project, and a run of a few steps."""
    for task in ("listops", "image"):
        snippet = snippet.replace(f'"{task}"', repr(TINY))
    return snippet.replace('recipe="quick"', f'recipe="quick", overrides={SMALL}')
