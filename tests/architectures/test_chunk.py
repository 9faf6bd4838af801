"""Recurrent mode for any number of tokens: gradients, the state, and who does it faster than by steps. That values are
those of forward and step is a conformance check."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from stepping import run
from torch import Tensor

from lra.architectures._stack import Stack
from lra.conformance.context import CheckContext
from lra.encoder import Mixer
from lra.registry import architectures

L, CUTS = 12, (0, 5, 6, 12)
FAST = [
    "gru", "gru/coupled", "lstm", "lstm/peephole", "lstm/layernorm", "elman", "indrnn", "mingru", "minlstm", "qrnn",
    "griffin", "s4d", "s4d/bilinear", "s5", "lru", "dss", "dss/exp", "linear_ssm", "mamba", "mamba2", "retnet", "gla",
    "deltanet", "deltanet/gated", "rwkv4", "linear_transformer", "performer", "cosformer", "transformer", "gqa",
    "local", "longformer", "bigbird", "sparse", "transformer/t5", "transformer/shaw", "differential", "hopfield",
    "entmax", "mla", "h_transformer_1d", "transformer_xl", "compressive",
]  # fmt: skip


def causal(name: str, **options: Any) -> Any:
    return CheckContext(architectures.get(name), {"direction": "causal", **options}).encoder()


def in_chunks(encoder: Any, x: Tensor) -> Tensor:
    state, parts = encoder.init_state(len(x)), []
    for first, last in pairwise(CUTS):
        y, state = encoder.chunk(x[:, first:last], state)
        parts.append(y)
    return torch.cat(parts, dim=1)


def gradients(encoder: Any, y: Tensor, x: Tensor) -> list[Tensor]:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * weights).sum(), [x, *encoder.parameters()], allow_unused=True))


@pytest.mark.parametrize("name", FAST)
def test_gradients_pass_through_the_state(name: str) -> None:
    encoder = causal(name)
    x = torch.randn(2, L, encoder.d_model, dtype=torch.float64, requires_grad=True)
    whole = gradients(encoder, encoder(x, torch.ones(2, L, dtype=torch.bool)), x)
    parts = gradients(encoder, in_chunks(encoder, x), x)
    names = ["x", *(name for name, _ in encoder.named_parameters())]
    for parameter, a, b in zip(names, parts, whole, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * float(b.abs().max() + 1), msg=parameter)


@pytest.mark.parametrize("name", FAST)
def test_these_do_it_faster_than_by_steps(name: str) -> None:
    encoder = causal(name)
    assert isinstance(encoder, Stack)
    assert all(type(layer.mixer).chunk is not Mixer.chunk for layer in encoder.blocks)


def test_a_chunk_is_no_loop_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = causal("gru")
    monkeypatch.setattr(type(encoder.layers[0].mixer), "step", None)
    y, _ = encoder.chunk(torch.randn(2, 5, encoder.d_model, dtype=torch.float64), encoder.init_state(2))
    assert y.shape == (2, 5, encoder.d_model)


def test_modes_of_dss_that_rise() -> None:
    """Half of the modes weigh tokens the more, the further back they lie."""
    encoder = causal("dss", state_size=6)
    mixer = encoder.layers[0].mixer
    with torch.no_grad():
        mixer.Lambda_re[::2] *= -1
    x = torch.randn(2, L, encoder.d_model, dtype=torch.float64)
    expected, last = run(mixer, x)
    state, parts = mixer.init_state(2), []
    for first, after in pairwise(CUTS):
        y, state = mixer.chunk(x[:, first:after], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(state[1], last[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["gru", "s4d", "mamba", "rwkv4"])
def test_float32_keeps_its_dtype(name: str) -> None:
    encoder = architectures.get(name)(d_model=16, n_layers=2, length=L)
    x, state = torch.randn(2, L, 16), encoder.init_state(2)
    before = [t.dtype for t in torch.utils._pytree.tree_leaves(state)]
    y, state = encoder.chunk(x, state)
    assert y.dtype == torch.float32
    assert [t.dtype for t in torch.utils._pytree.tree_leaves(state)] == before
    torch.testing.assert_close(y, encoder(x, torch.ones(2, L, dtype=torch.bool)), rtol=1e-4, atol=1e-4)


def test_tokens_past_the_last_position_are_refused() -> None:
    encoder = causal("transformer")
    x = torch.randn(1, 40, encoder.d_model, dtype=torch.float64)
    _, state = encoder.chunk(x, encoder.init_state(1))
    with pytest.raises(ValueError, match="length 80 exceeds the 64 positions this encoder has"):
        encoder.chunk(x, state)


def test_an_encoder_without_recurrent_mode_has_no_chunks() -> None:
    encoder = architectures.get("linformer")(d_model=16, n_layers=1, length=L)
    with pytest.raises(NotImplementedError, match="no recurrent mode"):
        encoder.init_state(1)
