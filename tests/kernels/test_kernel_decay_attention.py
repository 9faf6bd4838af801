"""`decay_attention` against published recurrences, and what only it promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F

from lra.kernels.decay_attention import decay_attention

IMPLEMENTATIONS = ["reference", "cpu"]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)


def leaves(z: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [z[f"in.{name}"].requires_grad_() for name in names]


def close_gradients(y: Tensor, z: dict[str, Tensor], inputs: list[Tensor], *names: str) -> None:
    for name, found in zip(names, torch.autograd.grad(y, inputs, z["w"]), strict=True):
        close(found, z[f"grad.{name}"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_retention(impl: str) -> None:
    """flash-linear-attention's retention: heads first, decay 1 - 2^(-5-h)."""
    z = golden("retention_op")
    names = ("q", "k", "v")
    inputs = leaves(z, *names)
    log_decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(inputs[0].shape[1], dtype=torch.float64))))
    q, k, v = (x.transpose(1, 2) for x in inputs)
    o = decay_attention(q, k, v, log_decay, chunk=4, impl=impl)
    close(o.transpose(1, 2), z["y"])
    close_gradients(o.transpose(1, 2), z, inputs, *names)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rwkv6(impl: str) -> None:
    """RWKV-6 reads the state before its token, which comes by a bonus u: its queries one step early."""
    z = golden("rwkv6_wkv")
    names = ("r", "k", "v", "decay", "u", "initial_state")
    inputs = leaves(z, *names)
    r, k, v, decay = (x.transpose(1, 2) for x in inputs[:4])
    u, h0 = inputs[4:]
    early = F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1))
    o, state = decay_attention(early, k, v, decay, chunk=4, scale=1.0, h0=h0, return_state=True, impl=impl)
    before = torch.cat([(r[:, :1].unsqueeze(-2) @ h0.unsqueeze(1)).squeeze(-2), o[:, :-1]], dim=1)
    y = (before + (r * u * k).sum(-1, keepdim=True) * v).transpose(1, 2)
    close(y, z["y"])
    close(state, z["mid.final_state"])
    close_gradients(y, z, inputs, *names)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gated_linear_attention(impl: str) -> None:
    z = golden("gla")
    names = ("q", "k", "v", "gk", "initial_state")
    inputs = leaves(z, *names)
    q, k, v, gate, h0 = inputs
    o, state = decay_attention(q, k, v, gate, chunk=8, h0=h0, return_state=True, impl=impl)
    close(o, z["y"])
    close(state, z["mid.final_state"])
    close_gradients(o, z, inputs, *names)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hgrn2(impl: str) -> None:
    """The forget gate is the decay, and one minus it the key."""
    z = golden("hgrn2")
    names = ("q", "v", "f_logit", "lower_bound")
    inputs = leaves(z, *names)
    q, v, logit, bound = inputs
    forget = bound + (1 - bound) * torch.sigmoid(logit)
    o, state = decay_attention(F.silu(q), 1 - forget, v, forget.log(), return_state=True, impl=impl)
    close(o, z["y"])
    close(state, z["mid.final_state"])
    close_gradients(o, z, inputs, *names)


Drawn = Callable[..., list[Tensor]]


@pytest.fixture
def drawn() -> Drawn:
    """q, k, v and log decays per channel: B 2, H 2, K 4, V 3."""

    def draw(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v, gate = (torch.randn(2, length, 2, width, generator=generator, dtype=dtype) for width in (4, 4, 3, 4))
        return [q, k, v, F.logsigmoid(gate)]

    return draw


@pytest.mark.parametrize("per", ["head", "channel"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_the_chunk_has_no_influence(drawn: Drawn, per: str, chunk: int) -> None:
    q, k, v, g = (x.requires_grad_() for x in drawn(37))
    decay = g.mean(-1) if per == "head" else g
    wanted, found = (decay_attention(q, k, v, decay, chunk=size) for size in (64, chunk))
    close(found, wanted)
    cotangent = torch.ones_like(v).cumsum(1)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v, g), cotangent) for o in (found, wanted)), strict=True):
        close(a, b)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_sequence_may_be_cut_anywhere(drawn: Drawn, per: str) -> None:
    """Running on from the returned state equals one run, in values and in gradients through the state."""
    inputs = [x.requires_grad_() for x in drawn(50)]

    def run(*cuts: int) -> tuple[Tensor, Tensor]:
        outputs, state = [], None
        for start, stop in zip((0, *cuts), (*cuts, 50), strict=True):
            q, k, v, g = (x[:, start:stop] for x in inputs)
            decay = g.mean(-1) if per == "head" else g
            o, state = decay_attention(q, k, v, decay, 8, h0=state, return_state=True)
            outputs.append(o)
        assert state is not None
        return torch.cat(outputs, dim=1), state

    whole, parts = run(), run(1, 20)
    for a, b in zip(whole, parts, strict=True):
        close(b, a)
    grads = (torch.autograd.grad(x[0].sin().sum() + x[1].sin().sum(), inputs) for x in (whole, parts))
    for a, b in zip(*grads, strict=True):
        close(b, a)


def test_decays_of_one_head_are_equal_decays_of_its_channels(drawn: Drawn) -> None:
    q, k, v, g = drawn(37)
    g = g.mean(-1)
    close(decay_attention(q, k, v, g.unsqueeze(-1).expand_as(q)), decay_attention(q, k, v, g))


@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_gate_of_zero_forgets_everything(drawn: Drawn, per: str) -> None:
    q, k, v, g = drawn(40, torch.float32)
    decay = g.mean(-1) if per == "head" else g.clone()
    decay[:, 21] = -torch.inf
    found = decay_attention(q, k, v, decay)
    wanted = decay_attention(q[:, 21:], k[:, 21:], v[:, 21:], decay[:, 21:])
    torch.testing.assert_close(found[:, 21:], wanted)


@pytest.mark.parametrize("per", ["head", "channel"])
def test_a_strong_decay_costs_the_steps_behind_it_no_digits(drawn: Drawn, per: str) -> None:
    """Sums of log decays in float32 would lose what follows a decay of e^-700 in the same chunk."""
    q, k, v, g = drawn(64, torch.float32)
    decay = g.mean(-1) if per == "head" else g.clone()
    decay[:, 3] = -700.0
    found = decay_attention(q, k, v, decay).double()
    wanted = decay_attention(q.double(), k.double(), v.double(), decay.double())
    assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_nothing_but_the_arguments_is_kept_for_backward(drawn: Drawn) -> None:
    q, k, v, g = (x.requires_grad_() for x in drawn(512))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        decay_attention(q, k, v, g)
    assert sum(kept) <= sum(x.numel() for x in (q, k, v, g))
