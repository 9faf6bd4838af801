"""Run the conformance checks on an encoder of this project or of your own, as `lra check` does.

from lra.conformance.suite import check
assert not [finding for finding in check("my_layer.py:MyLayer") if finding.failed]
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from lra.conformance import diagnosis
from lra.conformance.checks import CHECKS
from lra.conformance.context import Broken, CheckContext, NotDeclared
from lra.encoder import Card
from lra.errors import describe, unknown
from lra.registry import Constructor, architectures

__all__ = ["CHECKS", "Finding", "check", "meaning", "render"]

COLOURS = {"pass": "green", "fail": "bold red", "exempt": "yellow", "stale": "bold red", "undeclared": "cyan"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. message: one line.

    status: "pass"; "fail"; "exempt" (failed, and the card exempts it); "stale" (passed, although the card exempts it);
    "undeclared" (the wrapped layer lacks a declaration that the check needs; not a failure).
    """

    check: str
    status: str
    message: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status in ("fail", "stale")


def meaning(name: str) -> str:
    """The property that a check guarantees, in one line."""
    return (CHECKS[name].__doc__ or "").splitlines()[0]


def check(
    reference: str | Constructor, only: Iterable[str] | None = None, options: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Run conformance checks. An encoder that cannot be built yields a single finding.

    reference: a registered name, `file.py:Class`, `package.module:Class` or a constructor; only: names of the checks to
    run, by default all; options: constructor arguments that override the defaults. A common mistake, which would fail
    many checks, yields a single finding, too. Raises UserError for an unknown reference or check.
    """
    constructor = architectures.get(reference) if isinstance(reference, str) else reference
    names = list(CHECKS) if only is None else list(only)
    for name in names:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    context = CheckContext(constructor, dict(options or {}))
    with torch.random.fork_rng(devices=[]):
        started = time.perf_counter()
        try:
            context.encoder()
        except Exception as error:  # noqa: BLE001  (a user's constructor may raise anything)
            message = f"the encoder cannot be built: {describe(error)}"
            return [Finding("signature", "fail", message, time.perf_counter() - started)]
        findings: list[Finding] = []
        # a device is the one thing that no check on the CPU notices
        explained = constructor.declared or only is not None
        for name in CHECKS:
            if name not in names:
                continue
            findings.append(_run_check(name, context))
            if only is None and (not explained or (findings[-1].failed and not any(f.failed for f in findings[:-1]))):
                explained = True
                if cause := diagnosis.mistake(context):
                    return [Finding("mistake", "fail", cause, time.perf_counter() - started)]
        return findings


def _run_check(name: str, context: CheckContext) -> Finding:
    """Run one check and compare its outcome with the exemptions on the card."""
    card = getattr(context.constructor.cls, "card", None)
    exempt = card.exempt if isinstance(card, Card) else {}
    own = f"{context.constructor.name.partition('/')[2]}/{name}"
    reason = exempt.get(own, exempt.get(name))
    # a variant may need fewer exemptions than the card lists
    must_fail = not context.options and (own in exempt or not context.constructor.preset)
    started = time.perf_counter()
    try:
        remark = CHECKS[name](context)
        status, message = "pass", remark or meaning(name)
    except NotDeclared as missing:
        status, message = "undeclared", str(missing)
    except Broken as broken:
        status, message = "fail", str(broken)
    except Exception as error:  # noqa: BLE001  (a user's layer may raise anything)
        status, message = "fail", describe(error)
    if reason is not None and status == "fail":
        status, message = "exempt", reason
    elif reason is not None and status == "pass" and must_fail:
        status, message = "stale", f'passes although the card exempts it ("{reason}"); delete the exemption'
    return Finding(name, status, message, time.perf_counter() - started)


def render(findings: list[Finding]) -> Group:
    """Findings as a table of at most 100 columns, followed by a line of counts."""
    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("meaning", ratio=1, overflow="fold")
    table.add_column("s", justify="right", no_wrap=True)
    for f in findings:
        status = Text("not declared" if f.status == "undeclared" else f.status, style=COLOURS[f.status])
        table.add_row(f.check, status, Text(f.message), f"{f.seconds:.1f}")
    counts = {status: sum(f.status == status for f in findings) for status in COLOURS}
    parts = [f"{n} {'not declared' if status == 'undeclared' else status}" for status, n in counts.items() if n]
    return Group(Constrain(table, 100), Text(f"{len(findings)} checks: {', '.join(parts)}"))
