"""kda against tensors of the released layer and recurrence, and the memories it starts with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_layer_as_stored, golden
from stepping import run
from torch import Tensor

from lra.architectures._delta import channel_delta, channel_delta_step
from lra.architectures.linear_attention.kda import KDA, KDAMixer


def loaded(g: dict[str, Tensor], negative: bool = False) -> KDAMixer:
    head = len(g["param.o_norm.weight"])
    mixer = KDAMixer(g["x"].shape[-1], int(g["cfg.heads"]), head_dim=head, d_conv=4, negative=negative).double()
    mixer.load_state_dict({name: g[f"param.{name}"] for name, _ in mixer.named_parameters()})
    return mixer


def test_layer_equals_the_released_one() -> None:
    g = golden("kda_layer")
    assert_layer_as_stored(loaded(g), g)


def test_step_equals_the_released_layer() -> None:
    g = golden("kda_layer")
    y, state = run(loaded(g), g["x"])
    assert_close(y, g["y"], 1e-12)
    assert_close(state[3], g["mid.final_state"], 1e-12)


def test_recurrence_from_a_state_equals_the_released_one() -> None:
    g = golden("kda")
    names = ("q", "k", "v", "beta", "g", "initial_state")
    inputs = [g[f"in.{name}"].requires_grad_() for name in names]
    q, k, v, beta, decay, S = inputs
    outputs = []
    for t in range(q.shape[1]):
        key = k[:, t]
        scaled = q[:, t] * q.shape[-1] ** -0.5
        o, S = channel_delta_step(scaled, key, beta[:, t, :, None] * key, v[:, t], decay[:, t], S)
        outputs.append(o)
    y = torch.stack(outputs, 1)
    assert_close(y, g["y"], 1e-12)
    assert_close(S, g["mid.final_state"], 1e-12)
    for name, grad in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


@pytest.mark.parametrize("length", [1, 32, 50])
def test_chunks_equal_the_recurrence_with_every_gradient(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, length, 3, 4, dtype=torch.float64).unbind()
    k, beta = k / k.norm(dim=-1, keepdim=True), 2 * torch.rand(2, length, 3, 1, dtype=torch.float64)
    log_decay = -torch.rand(2, length, 3, 4, dtype=torch.float64)
    log_decay[:, ::5] *= 50
    inputs = [x.requires_grad_() for x in (q, k, v, beta, log_decay)]
    ours = channel_delta(q, k, beta * k, v, log_decay)
    S, outputs = q.new_zeros(2, 3, 4, 4), []
    for q_, k_, v_, beta_, g_ in zip(*(x.unbind(1) for x in inputs), strict=True):
        o, S = channel_delta_step(q_, k_, beta_ * k_, v_, g_, S)
        outputs.append(o)
    theirs = torch.stack(outputs, 1)
    assert_close(ours, theirs)
    w = torch.randn_like(ours)
    grads = [torch.autograd.grad(y, inputs, w) for y in (ours, theirs)]
    for name, own, other in zip(("q", "k", "v", "beta", "g"), *grads, strict=True):
        assert_close(own, other, 1e-10, name)


def test_negative_doubles_the_strength() -> None:
    g = golden("kda_layer")
    plain, doubled = (
        loaded(g, negative)._terms(g["x"], *g["x"].new_ones(3, *g["x"].shape[:2], 8)) for negative in (False, True)
    )
    assert_close(doubled[2], 2 * plain[2], 1e-14)


def test_channels_start_with_memories_from_one_token_to_thousands() -> None:
    torch.manual_seed(0)
    mixer = KDA(d_model=256, n_layers=1, length=8).blocks[0].mixer
    assert isinstance(mixer, KDAMixer)
    x = torch.zeros(1, 256)
    log_alpha = mixer._terms(x, x, x, x)[4]
    assert -16 * 0.1 <= log_alpha.min() < -0.1
    assert -1e-2 < log_alpha.max() < 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_heads": 3}, "n_heads is 3; a divisor of d_model, 8, unless head_dim is given"),
        ({"head_dim": 0}, "head_dim is 0; at least 1"),
        ({"d_conv": 0}, "d_conv is 0; at least 1"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KDA(**{"d_model": 8, "n_layers": 1, "length": 8, **wrong})
    assert KDA(d_model=8, n_layers=1, length=8, n_heads=3, head_dim=5).blocks
