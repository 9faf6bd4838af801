"""`ssd` against the code of Mamba-2, and what only it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor

from lra.kernels.decay_attention import decay_attention
from lra.kernels.ssd import ssd


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_mamba2(impl: str) -> None:
    """ssd_minimal_discrete, the chunked listing of the paper, and the step-by-step state update."""
    z = golden("mamba2_ssd")
    names = ("x", "dt", "A", "B", "C", "initial_state")
    inputs = [z[f"in.{name}"].requires_grad_() for name in names]
    x, dt, A, B, C, h0 = inputs
    y, state = ssd(x, dt, A, B, C, int(z["cfg.chunk"]), h0=h0, return_state=True, impl=impl)
    for key in ("y", "mid.y_recurrent"):
        close(y, z[key])
    for key in ("mid.final_state", "mid.final_state_recurrent"):
        close(state, z[key])
    for name, found in zip(names, torch.autograd.grad(y, inputs, z["w"]), strict=True):
        close(found, z[f"grad.{name}"])


@pytest.fixture
def inputs() -> dict[str, Any]:
    """B 2, L 40, H 4 in two groups, P 3, N 5."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt, A = torch.nn.functional.softplus(normal(2, 40, 4)), -normal(4).exp()
    return {"x": normal(2, 40, 4, 3), "dt": dt, "A": A, "B": normal(2, 40, 2, 5), "C": normal(2, 40, 2, 5)}


@pytest.mark.parametrize("chunk", [1, 12, 16, 64])
def test_a_group_serves_neighbouring_heads(inputs: dict[str, Any], chunk: int) -> None:
    """Heads 0 and 1 read group 0, heads 2 and 3 group 1, whatever the chunk."""
    per_head = {name: inputs[name].repeat_interleave(2, 2) for name in ("B", "C")}
    close(ssd(**inputs, chunk=chunk), ssd(**inputs | per_head))
    first = {name: t[:, :, :2] for name, t in inputs.items() if name in ("x", "dt")}
    alone = ssd(**first, A=inputs["A"][:2], B=inputs["B"][:, :, :1], C=inputs["C"][:, :, :1])
    close(alone, ssd(**inputs)[:, :, :2])


def test_it_is_decayed_attention(inputs: dict[str, Any]) -> None:
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    q, k = (t.repeat_interleave(2, 2) for t in (C, B))
    close(ssd(**inputs), decay_attention(q, k, x * dt[..., None], dt * A, scale=1.0))


def test_a_sequence_may_be_cut_anywhere(inputs: dict[str, Any]) -> None:
    whole, last = ssd(**inputs, return_state=True)

    def part(start: int, stop: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        given = {name: t if name == "A" else t[:, start:stop] for name, t in inputs.items()}
        return ssd(**given, h0=state, return_state=True)

    first, state = part(0, 17, None)
    second, end = part(17, 40, state)
    close(torch.cat([first, second], dim=1), whole)
    close(end, last)


def test_a_step_of_zero_changes_nothing(inputs: dict[str, Any]) -> None:
    """dt = 0 neither decays the state nor writes to it: padding in the middle leaves the rest as it is."""
    gaps = {name: t if name == "A" else t.repeat_interleave(2, 1) for name, t in inputs.items()}
    gaps["dt"][:, 1::2] = 0
    close(ssd(**gaps)[:, ::2], ssd(**inputs))


def test_groups_must_divide_the_heads(inputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ssd: B is .*; expected .*G dividing 4"):
        ssd(**inputs | {"B": inputs["B"].repeat(1, 1, 2, 1)[:, :, :3]})
