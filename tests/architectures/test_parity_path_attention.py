"""path_attention against tensors of its definition, and the layer with its products of matrices written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor

from lra.architectures.linear_attention import path_attention
from lra.architectures.linear_attention.path_attention import PathAttention, PathMixer

NAMES = ("q", "k", "v", "w", "beta", "g")


@pytest.mark.parametrize("chunk", [1, 2, 4, 64])
def test_outputs_and_gradients_equal_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums of gates are scaled with the logits."""
    monkeypatch.setattr(path_attention, "CHUNK", chunk)
    g = golden("path_attention")
    inputs = [g[f"in.{name}"].requires_grad_() for name in NAMES]
    q, k, v, w, beta, gate = inputs
    assert_close(path_attention.path_attention(q, k, v, w, beta), g["mid.y_nogate"], 1e-12)
    y = path_attention.path_attention(q, k, v, w, beta, gate * q.shape[-1] ** -0.5)
    assert_close(y, g["y"], 1e-12)
    for name, grad in zip(NAMES, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


def mixer_of(**own: Any) -> PathMixer:
    torch.manual_seed(0)
    encoder = PathAttention(**{"d_model": 8, "n_layers": 1, "length": 32, "n_heads": 2, "rank": 3, **own})
    mixer = encoder.double().blocks[0].mixer
    assert isinstance(mixer, PathMixer)
    return mixer


def with_products(mixer: PathMixer, x: Tensor) -> Tensor:
    """Every P_ij as a product of matrices."""
    heads, length = mixer.n_heads, x.shape[1]
    low, high = (p.weight for p in mixer.w_proj.children() if isinstance(p, torch.nn.Linear))
    u, taps = x @ low.T @ high.T, mixer.w_conv1d.weight.squeeze(1)
    late = [torch.cat([torch.zeros_like(u[:, :j]), u[:, : length - j]], 1) for j in range(taps.shape[1])]
    u = sum((taps[:, -1 - j] * late[j] for j in range(taps.shape[1])), torch.zeros_like(u))
    w = (u / (1 + torch.exp(-u))).unflatten(-1, (heads, -1))
    w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k, v = ((x @ p.weight.T).unflatten(-1, (heads, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    beta = 2 / (1 + torch.exp(-(x @ mixer.bt_proj.weight.T + mixer.bt_proj.bias)))
    gate = torch.zeros_like(beta)
    if mixer.g_proj is not None:
        gate = -torch.log1p(torch.exp(-(x @ mixer.g_proj.weight.T + mixer.g_proj.bias)))
    eye, rows = torch.eye(q.shape[-1], dtype=x.dtype), []
    factor = eye - beta[..., None, None] * w.unsqueeze(-1) * w.unsqueeze(-2)
    for i in range(length):
        product, faded, logits = eye.expand(len(x), heads, -1, -1), torch.zeros_like(gate[:, 0]), []
        for j in range(i, -1, -1):
            score = (q[:, i].unsqueeze(-2) @ product @ k[:, j].unsqueeze(-1)).flatten(1)
            logits.append(score / q.shape[-1] ** 0.5 + faded)
            product, faded = product @ factor[:, j], faded + gate[:, j]
        weights = torch.stack(logits[::-1], -1).softmax(-1)
        rows.append(torch.einsum("bht,bthk->bhk", weights, v[:, : i + 1]).flatten(1))
    return torch.stack(rows, 1) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("forget", [False, True])
def test_layer_and_gradients_equal_the_products(forget: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_attention, "CHUNK", 4)
    mixer = mixer_of(forget=forget)
    x = torch.randn(2, 15, 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = mixer(x, everything(x)), with_products(mixer, x)
    assert_close(ours, theirs)
    w = torch.randn_like(ours)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    grads = [torch.autograd.grad(y, (x, *parameters), w) for y in (ours, theirs)]
    for name, own, other in zip(("x", *names), *grads, strict=True):
        assert_close(own, other, 1e-10, name)


@pytest.mark.parametrize("forget", [False, True])
def test_step_equals_forward(forget: bool) -> None:
    mixer = mixer_of(forget=forget)
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    assert_close(run(mixer, x)[0], mixer(x, everything(x)))


test_wrong_arguments_are_named = refuses(PathAttention, d_model=8, n_layers=1, length=8)(
    ({"rank": 0}, "rank is 0; at least 1"),
    ({"n_heads": 3}, "n_heads is 3; a divisor of d_model, 8"),
)
