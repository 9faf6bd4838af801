"""Gradient reach: the gradient of an untrained encoder's last output with respect to each input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lra.errors import UserError
from lra.registry import Constructor, architectures

FLOOR = 1e-20
"""Smallest norm that plots show."""


def reach(
    reference: str | Constructor, *, length: int = 1024, d_model: int = 64, n_layers: int = 2, probes: int = 4,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """Frobenius norm |d y_L / d x_t| for t = 1 .. L, as a root mean square over `probes` random inputs: (L,) float64.

    Computed in double precision, so that small gradients are not rounded to zero. The encoder is causal if its
    constructor takes a direction. Each probe uses one random direction v of y_L: the mean of |v' J|^2 over v is |J|^2.
    """
    constructor = architectures.get(reference) if isinstance(reference, str) else reference
    shape = {"d_model": d_model, "n_layers": n_layers, "length": length}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            encoder = constructor(**shape, **({"direction": "causal"} if "direction" in constructor.options() else {}))
        except UserError:  # the architecture does not support "causal"
            encoder = constructor(**shape)
        # .double() does not convert complex tensors
        encoder._apply(lambda t: t.to({torch.float32: torch.float64, torch.complex64: torch.complex128}.get(t.dtype)))
        x = torch.randn(probes, length, d_model, dtype=torch.float64, requires_grad=True)
        v = torch.randn(probes, d_model, dtype=torch.float64)
        y = encoder.eval()(x, torch.ones(probes, length, dtype=torch.bool))
        (grad,) = torch.autograd.grad((y[:, -1] * v).sum(), x)
    return grad.square().sum(-1).mean(0).sqrt()


def plot(norms: Tensor, columns: int = 64, rows: int = 12) -> str:
    """Plot the norms over t as text, on a logarithmic scale. A column shows the largest norm of its range of inputs."""
    maxima = torch.tensor([part.max().item() for part in norms.tensor_split(min(columns, len(norms)))])
    levels = maxima.clamp_min(FLOOR).log10()
    top = max(math.ceil(levels.max().item()), 0)
    bottom = math.log10(FLOOR)
    height = ((levels - bottom) / (top - bottom) * rows).ceil()
    lines = []
    for row in range(rows, 0, -1):
        label = f" 1e{round(bottom + row * (top - bottom) / rows):+03d}"
        lines.append(f"{label} |" + "".join("█" if h >= row else " " for h in height))
    lines.append(" " * 7 + "+" + "-" * len(maxima))
    lines.append(" " * 8 + "t = 1" + f"L = {len(norms):,}".rjust(len(maxima) - 5))
    return "\n".join(lines)
