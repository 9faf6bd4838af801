"""Examples of the tasks, for their pages: drawn when the site is built, for tasks whose data are generated."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from docstrings import code

from lra import registry
from lra.task import Task
from lra.terminal import contact_sheet

COUNT = 4
SHORTENED = 600
"""Characters of an example that a page shows at most."""


def section(task: Task) -> str:
    """The examples of a task as Markdown: text, a picture where the examples are images, or the command for them."""
    found = _drawn(task.name)
    if found is None:
        return f"This task reads raw files, which are not part of the site. To see examples:\n\n{_command(task)}"
    texts, picture = found
    shown = [] if picture is None else [f"![Examples of {task.name}]({task.name}.png)"]
    return "\n\n".join([*shown, code("\n".join(texts), "text")])


def pictures() -> dict[str, bytes]:
    """PNG files beside the pages of the tasks: path inside the site -> content."""
    found = {name: _drawn(name) for name in registry.tasks.names() if registry.tasks.family(name) != registry.PLUGIN}
    return {f"reference/tasks/{name}.png": made[1] for name, made in found.items() if made and made[1]}


def _command(task: Task) -> str:
    png = f" --png {task.name}.png" if hasattr(task, "picture") else ""
    return code(f"lra data show {task.name}{png}", "bash")


@cache
def _drawn(name: str) -> tuple[list[str], bytes | None] | None:
    """The first test examples of the default protocol in words, and as one PNG; None where they need raw files."""
    task: Any = registry.tasks.get(name)()
    protocol = next(iter(task.protocols.values()))
    if protocol.raw:
        return None
    counts = dict.fromkeys(protocol.splits, 1) | {"test": COUNT}
    small = replace(protocol, counts=counts, sha256={})
    with TemporaryDirectory() as place:
        folder = Path(place)
        task.prepare(folder, small, source=None, workers=1, progress=lambda *_: None)
        split = task.load(folder, "test")
        texts = [_short(task.describe(split, number)) for number in range(COUNT)]
        if not hasattr(task, "picture"):
            return texts, None
        contact_sheet([task.picture(split, number) for number in range(COUNT)], folder / "examples.png")
        return texts, (folder / "examples.png").read_bytes()


def _short(text: str) -> str:
    return text if len(text) <= SHORTENED else f"{text[: SHORTENED // 2]} ... {text[-SHORTENED // 2 :]}"
