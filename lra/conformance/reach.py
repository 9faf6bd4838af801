"""Gradient reach: how much of an untrained encoder's last output hangs on each of its inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lra.errors import UserError
from lra.registry import Constructor, architectures

FLOOR = 1e-20
"""Norms below this are drawn at it."""


def reach(
    reference: str | Constructor, *, length: int = 1024, d_model: int = 64, n_layers: int = 2, probes: int = 4,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """Root mean square over random inputs of |d y_L / d x_t|, the Frobenius norm, for t = 1 .. L: (L,) float64.

    In double precision, so that what has vanished can be told from what was rounded away; causal where the architecture
    lets one choose. Each input has one random direction v of y_L: the mean of |v' J|^2 over v is |J|^2.
    """
    constructor = architectures.get(reference) if isinstance(reference, str) else reference
    shape = {"d_model": d_model, "n_layers": n_layers, "length": length}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            encoder = constructor(**shape, **({"direction": "causal"} if "direction" in constructor.options() else {}))
        except UserError:  # it refuses to be causal
            encoder = constructor(**shape)
        # .double() would leave complex tensors single
        encoder._apply(lambda t: t.to({torch.float32: torch.float64, torch.complex64: torch.complex128}.get(t.dtype)))
        x = torch.randn(probes, length, d_model, dtype=torch.float64, requires_grad=True)
        v = torch.randn(probes, d_model, dtype=torch.float64)
        y = encoder.eval()(x, torch.ones(probes, length, dtype=torch.bool))
        (grad,) = torch.autograd.grad((y[:, -1] * v).sum(), x)
    return grad.square().sum(-1).mean(0).sqrt()


def plot(norms: Tensor, columns: int = 64, rows: int = 12) -> str:
    """The norms over t as text: a logarithmic scale, each column the largest norm of its share of the inputs."""
    shares = torch.tensor([part.max().item() for part in norms.tensor_split(min(columns, len(norms)))])
    levels = shares.clamp_min(FLOOR).log10()
    top = max(math.ceil(levels.max().item()), 0)
    bottom = math.log10(FLOOR)
    height = ((levels - bottom) / (top - bottom) * rows).ceil()
    lines = []
    for row in range(rows, 0, -1):
        label = f" 1e{round(bottom + row * (top - bottom) / rows):+03d}"
        lines.append(f"{label} |" + "".join("█" if h >= row else " " for h in height))
    lines.append(" " * 7 + "+" + "-" * len(shares))
    lines.append(" " * 8 + "t = 1" + f"L = {len(norms):,}".rjust(len(shares) - 5))
    return "\n".join(lines)
