"""log_linear_attention against tensors of its definition, with the authors' mask, and the layer as one sum."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor

from lra.architectures.linear_attention import log_linear_attention
from lra.architectures.linear_attention.log_linear_attention import LogLinearAttention, LogLinearMixer, log_linear

NAMES = ("q", "k", "v", "g", "level_scales")


@pytest.mark.parametrize("chunk", [2, 4, 16, 64])
def test_outputs_and_gradients_equal_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of every size: levels are a mask inside them and states of blocks above."""
    monkeypatch.setattr(log_linear_attention, "CHUNK", chunk)
    g = golden("log_linear_attention")
    inputs = [g[f"in.{name}"].requires_grad_() for name in NAMES]
    y = log_linear(*inputs)
    assert_close(y, g["y"], 1e-12)
    assert_close(y, g["mid.y_authors"], 1e-12)
    for name, grad in zip(NAMES, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


def test_levels_equal_the_authors() -> None:
    g = golden("log_linear_attention")
    levels = log_linear_attention.levels_inside(len(g["mid.levels"]), torch.device("cpu"))
    assert torch.equal(levels.tril(), g["mid.levels"].tril())


def mixer_of(length: int) -> LogLinearMixer:
    torch.manual_seed(0)
    encoder = LogLinearAttention(d_model=6, n_layers=1, length=length, state_size=5, head_dim=4, d_conv=3)
    mixer = encoder.double().blocks[0].mixer
    assert isinstance(mixer, LogLinearMixer)
    with torch.no_grad():
        for parameter in (mixer.L, mixer.D, mixer.norm.weight):
            parameter.uniform_(0.5, 1.5)
    return mixer


def as_one_sum(mixer: LogLinearMixer, x: Tensor) -> Tensor:
    """The equations for all pairs of tokens."""
    heads, length = mixer.n_heads, x.shape[1]
    z, u, dt, dl = (x @ mixer.in_proj.weight.T).split(mixer.sizes, -1)
    taps = mixer.conv1d.weight.squeeze(1)
    late = [torch.cat([torch.zeros_like(u[:, :j]), u[:, : length - j]], 1) for j in range(taps.shape[1])]
    u = sum((taps[:, -1 - j] * late[j] for j in range(taps.shape[1])), torch.zeros_like(u))
    x, B, C = (u / (1 + torch.exp(-u))).split(mixer.inner, -1)
    x = x.unflatten(-1, (heads, -1))
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias))
    weight = torch.log1p(torch.exp(dl.unflatten(-1, (heads, -1)) * mixer.L))
    gone = (-mixer.A_log.exp() * dt).cumsum(1)
    rows = []
    for t in range(length):
        row = mixer.D.unsqueeze(-1) * x[:, t]
        for s in range(t + 1):
            level = (t ^ s).bit_length()
            score = (C[:, t] * B[:, s]).sum(-1, keepdim=True) * (gone[:, t] - gone[:, s]).exp()
            row = row + (weight[:, t, :, level] * score * dt[:, s]).unsqueeze(-1) * x[:, s]
        rows.append(row.flatten(1))
    y = torch.stack(rows, 1) * z / (1 + torch.exp(-z))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return y @ mixer.out_proj.weight.T


def test_layer_and_gradients_equal_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_linear_attention, "CHUNK", 4)
    mixer = mixer_of(22)
    x = torch.randn(2, 22, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = mixer(x, everything(x)), as_one_sum(mixer, x)
    assert_close(ours, theirs)
    w = torch.randn_like(ours)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    grads = [torch.autograd.grad(y, (x, *parameters), w) for y in (ours, theirs)]
    for name, own, other in zip(("x", *names), *grads, strict=True):
        assert_close(own, other, 1e-10, name)


@pytest.mark.parametrize("length", [1, 2, 9, 16, 130])
def test_step_equals_forward_at_every_length(length: int) -> None:
    mixer = mixer_of(length)
    x = torch.randn(1, length, 6, dtype=torch.float64)
    assert_close(run(mixer, x)[0], mixer(x, everything(x)))


def test_a_sequence_longer_than_its_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="length 17 exceeds the 16 tokens"):
        mixer_of(16)(torch.zeros(1, 17, 6, dtype=torch.float64), torch.ones(1, 17, dtype=torch.bool))


test_wrong_arguments_are_named = refuses(LogLinearAttention, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"head_dim": 5}, "head_dim is 5; a divisor of expand"),
)
