"""Conformance checks for any encoder, ours or yours: the public face of what `lra check` runs.

from lra.testing import check
assert not [f for f in check("my_layer.py:MyLayer") if f.failed]
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from lra.conformance.checks import CHECKS, Broken, NotDeclared, Subject
from lra.encoder import Card
from lra.errors import UserError, unknown
from lra.registry import Constructor, architectures

__all__ = ["CHECKS", "Finding", "check", "meaning", "render"]

COLOURS = {"pass": "green", "fail": "bold red", "exempt": "yellow", "stale": "bold red", "undeclared": "cyan"}
PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Finding:
    """What one check found, in one line.

    status: "pass"; "fail"; "exempt" (failed, as the card's exemption says it would); "stale" (passes although the card
    exempts it; a variant may need fewer exemptions than the card lists); "undeclared" (a wrapped layer does not say
    what the check compares with: reported, not failed).
    """

    check: str
    status: str
    message: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status in ("fail", "stale")


def meaning(name: str) -> str:
    """What passing the check of this name means, in one line."""
    return (CHECKS[name].__doc__ or "").splitlines()[0]


def check(
    reference: str | Constructor, only: Iterable[str] | None = None, options: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Run the conformance checks, or those in `only`, on a registered name, `file.py:Class`, `package.module:Class` or
    a constructor. `options`: constructor arguments to use instead of the defaults.

    Where the encoder cannot be built at all, only that is found. Raises UserError for a reference or check that does
    not exist.
    """
    constructor = architectures.get(reference) if isinstance(reference, str) else reference
    wanted = list(CHECKS) if only is None else list(only)
    for name in wanted:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    subject = Subject(constructor, dict(options or {}))
    with torch.random.fork_rng(devices=[]):
        started = time.perf_counter()
        try:
            subject.encoder()
        except Exception as error:  # noqa: BLE001  (a stranger's constructor may raise anything)
            return [Finding("signature", "fail", f"it cannot be built: {_said(error)}", time.perf_counter() - started)]
        return [_finding(name, subject) for name in CHECKS if name in wanted]


def _finding(name: str, subject: Subject) -> Finding:
    card = getattr(subject.constructor.cls, "card", None)
    exempt = card.exempt if isinstance(card, Card) else {}
    own = f"{subject.constructor.name.partition('/')[2]}/{name}"
    reason = exempt.get(own, exempt.get(name))
    as_declared = not subject.options and (own in exempt or not subject.constructor.preset)
    started = time.perf_counter()
    try:
        remark = CHECKS[name](subject)
        status, message = "pass", remark or meaning(name)
    except NotDeclared as missing:
        status, message = "undeclared", str(missing)
    except Broken as broken:
        status, message = "fail", str(broken)
    except Exception as error:  # noqa: BLE001  (a stranger's layer may raise anything)
        status, message = "fail", _said(error)
    if reason is not None and status == "fail":
        status, message = "exempt", reason
    elif reason is not None and status == "pass" and as_declared:
        status, message = "stale", f'the card exempts it ("{reason}"), but it passes: delete the exemption'
    return Finding(name, status, message, time.perf_counter() - started)


def _said(error: Exception) -> str:
    """An unforeseen exception in one line, with the place in the layer's own code."""
    if isinstance(error, UserError):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(p in f.filename for p in PACKAGES)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text[:300]}{place}"


def render(findings: list[Finding]) -> Group:
    """The findings as a table of at most 100 columns, and a closing line."""
    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what it means", ratio=1, overflow="fold")
    table.add_column("s", justify="right", no_wrap=True)
    for f in findings:
        status = Text("not declared" if f.status == "undeclared" else f.status, style=COLOURS[f.status])
        table.add_row(f.check, status, Text(f.message), f"{f.seconds:.1f}")
    counts = {status: sum(f.status == status for f in findings) for status in COLOURS}
    parts = [f"{n} {'not declared' if status == 'undeclared' else status}" for status, n in counts.items() if n]
    return Group(Constrain(table, 100), Text(f"{len(findings)} checks: {', '.join(parts)}"))
