"""The pages of the documentation site, the written ones and those generated from the code.

    python docs/pages.py FOLDER          writes them all, as Markdown for Sphinx

The reference is read from the registry, the docstrings, the recipes and the command line when the site is built, so
a new architecture, task or operator has its page without an entry in any list.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import reference
import samples
from docstrings import code, prose

ROOT = Path(__file__).parents[1]
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md", "results/README.md", "results/LEADERBOARD.md")
"""Documents of the repository that are pages of the site too."""


def pages() -> dict[str, str]:
    """Every page: path inside the site -> Markdown."""
    paths = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}
    paths |= {name: ROOT / name for name in COPIED}
    written = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    examples = {f"examples/{path.stem}.md": example(path) for path in sorted((ROOT / "examples").glob("*.py"))}
    return written | examples | reference.pages()


def example(path: Path) -> str:
    """A script in percent format as a page: `# %% [markdown]` cells are prose, the others code."""
    blocks = []
    for cell in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            blocks.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        elif body.strip():
            blocks.append(code(body.strip()))
    return "\n\n".join([*blocks, prose(f"The script: `examples/{path.name}`.")]) + "\n"


def write(folder: Path) -> None:
    """Write every page and picture below an empty or new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in {**{name: text.encode() for name, text in pages().items()}, **samples.pictures()}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
