"""Tools of the conformance checks: small encoders of one constructor, their inputs and outputs, a fresh process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lra.encoder import Card, Encoder
from lra.errors import UserError
from lra.registry import Constructor, architectures

WIDTH, LAYERS, LENGTH, LONGEST = 16, 2, 32, 64


class Broken(Exception):
    """The check failed; the message explains the fault."""


class NotDeclared(Exception):
    """A wrapped layer lacks the declaration that the check compares with; the message holds the measured value."""


@dataclass(frozen=True)
class CheckContext:
    """The subject of a check: a constructor, and arguments that replace its defaults."""

    constructor: Constructor
    options: Mapping[str, Any] = field(default_factory=dict)

    def encoder(self, dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> Encoder:
        torch.manual_seed(seed)
        shape = {"d_model": WIDTH, "n_layers": LAYERS, "length": LONGEST}
        built: Encoder = self.constructor(**{**shape, **self.options, **more})
        built._apply(lambda t: cast(t, dtype))  # .to(dtype) would drop imaginary parts, .double() leave them single
        return built.eval()

    def directions(self, dtype: torch.dtype = torch.float64, **more: Any) -> list[tuple[str, Encoder]]:
        """The default instance and, where the constructor lets one choose, that of the other direction; each with
        words for a message. No parameter is zero throughout: a map that starts at zero hides what lies behind it."""
        default = woken(self.encoder(dtype, **more))
        encoders = [("", default)]
        for other in ("causal", "bidirectional") if "direction" in self.constructor.options() else ():
            if other != default.direction and "direction" not in self.options:
                with suppress(UserError):  # a direction may be refused; what the card promises, `causal` checks
                    built = self.encoder(dtype, direction=other, **more)
                    encoders.append((f"with direction={other!r} ", woken(built)))
        return encoders

    def declares(self, what: str) -> bool:
        """Whether "card", "cost", "direction" or "step" is declared; an Encoder declares all, a wrapped layer some."""
        return self.constructor.declared or what in getattr(self.constructor.cls, "declares", ())

    @property
    def card(self) -> Card:
        return self.constructor.cls.card


@torch.no_grad()
def woken(encoder: Encoder) -> Encoder:
    """The encoder itself, with small random numbers in parameters that are zero throughout."""
    for parameter in encoder.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return encoder


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Real tensors to `dtype`, complex ones to its complex twin, others as they are."""
    if t.is_complex():
        return t.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return t.to(dtype) if t.is_floating_point() else t


def inputs(lengths: Sequence[int], total: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random x: (B, total, D) and the mask of rows with these numbers of real tokens."""
    x = torch.randn(len(lengths), total, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(7))
    return x, torch.arange(total) < torch.tensor(lengths).unsqueeze(1)


@torch.no_grad()
def outputs(encoder: Encoder, x: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
    """Outputs of the encoder at real positions, zeros elsewhere."""
    torch.manual_seed(seed)
    return encoder(x, mask).masked_fill(~mask.unsqueeze(-1), 0)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference over the RMS of b; infinite where either holds a NaN."""
    ratio = ((a - b).abs().max() / b.square().mean().sqrt().clamp_min(1e-30)).item()
    return math.inf if math.isnan(ratio) else ratio


def reloaded(contexts: Sequence[CheckContext]) -> list[str]:
    """For each context, what went wrong when one fresh process rebuilt it and loaded its state, or nothing."""
    x, mask = inputs([LENGTH, 17], LENGTH, torch.float32)
    jobs, expected = [], []
    for context in contexts:
        encoder = context.encoder(torch.float32)
        expected.append(outputs(encoder, x, mask))
        options = dict(context.options)
        jobs.append({"name": context.constructor.name, "options": options, "state": encoder.state_dict()})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "jobs.pt")
        torch.save({"jobs": jobs, "x": x, "mask": mask, "threads": torch.get_num_threads()}, place)
        script = "import sys; from lra.conformance import context; context.reload(sys.argv[1])"
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        done = subprocess.run(
            [sys.executable, "-c", script, str(place)],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [f"a fresh process could not load it: {last}"] * len(contexts)
        stored = torch.load(place, weights_only=True)
    faults = [""] * len(contexts)
    for i, (y, own) in enumerate(zip(stored, expected, strict=True)):
        if isinstance(y, str):
            faults[i] = f"a fresh process could not load it: {y}"
        elif not torch.equal(y, own):
            faults[i] = (
                f"after loading its state in a fresh process outputs differ by {gap(y, own):.2g}: "
                "a value that it uses is neither a parameter nor a persistent buffer"
            )
    return faults


def reload(place: str) -> None:
    """The fresh process's side of `reloaded`: other initial weights, then the saved state. Replaces the file."""
    given = torch.load(place, weights_only=True)
    torch.set_num_threads(given["threads"])
    answers: list[Tensor | str] = []
    for job in given["jobs"]:
        try:
            context = CheckContext(architectures.get(job["name"]), job["options"])
            encoder = context.encoder(torch.float32, seed=1)
            encoder.load_state_dict(job["state"])
            answers.append(outputs(encoder, given["x"], given["mask"]))
        except Exception as error:  # noqa: BLE001  (a stranger's code may raise anything; the parent reports it)
            answers.append(f"{type(error).__name__}: {error}")
    torch.save(answers, place)
