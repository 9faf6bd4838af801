"""mesa against tensors of the exact solution, and the layer token by token with its matrices inverted."""

from __future__ import annotations

from typing import Any

import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor

from lra.architectures.linear_attention.mesa import LOWEST, Mesa, MesaMixer, mesa

NAMES = ("q", "k", "v", "beta", "g", "lamb")


def test_outputs_and_gradients_equal_the_exact_solution() -> None:
    g = golden("mesa")
    inputs = [g[f"in.{name}"].requires_grad_() for name in NAMES]
    q, k, v, beta, log_gamma, ridge = inputs
    y = mesa(q, k, v, beta, log_gamma, ridge, 30)
    assert_close(y, g["y"], 1e-12)
    for name, grad in zip(NAMES, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


def mixer_of(**own: Any) -> MesaMixer:
    torch.manual_seed(0)
    mixer = Mesa(**{"d_model": 8, "n_layers": 1, "length": 32, "n_heads": 2, **own}).double().blocks[0].mixer
    assert isinstance(mixer, MesaMixer)
    with torch.no_grad():
        mixer.o_norm.weight.uniform_(0.5, 1.5)
        mixer.lambda_params.uniform_(-1, 1)
    return mixer


def token_by_token(mixer: MesaMixer, x: Tensor) -> Tensor:
    """The equations, with the normal equations of each token solved by elimination."""
    heads, length = mixer.n_heads, x.shape[1]
    filtered = []
    for proj, conv in ((mixer.q_proj, mixer.q_conv1d), (mixer.k_proj, mixer.k_conv1d)):
        u, taps = x @ proj.weight.T, conv.weight.squeeze(1)
        late = [torch.cat([torch.zeros_like(u[:, :j]), u[:, : length - j]], 1) for j in range(taps.shape[1])]
        u = sum((taps[:, -1 - j] * late[j] for j in range(taps.shape[1])), torch.zeros_like(u))
        u = (u / (1 + torch.exp(-u))).unflatten(-1, (heads, -1))
        filtered.append(u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    q, k = filtered
    v = (x @ mixer.v_proj.weight.T).unflatten(-1, (heads, -1))
    beta, gamma = (1 / (1 + torch.exp(-(x @ p.weight.T + p.bias))) for p in (mixer.b_proj, mixer.a_proj))
    ridge = torch.diag_embed((torch.log1p(mixer.lambda_params.exp()) + LOWEST).view(heads, -1))
    G, S, outputs = torch.zeros_like(ridge), torch.zeros_like(ridge), []
    for t in range(length):
        weighted = (beta[:, t, :, None] * k[:, t]).unsqueeze(-1)
        kept = gamma[:, t, :, None, None]
        G, S = kept * G + weighted * k[:, t].unsqueeze(-2), kept * S + weighted * v[:, t].unsqueeze(-2)
        read = torch.linalg.solve(G + ridge, q[:, t].unsqueeze(-1))
        outputs.append((S.mT @ read).squeeze(-1))
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
    return o.flatten(-2) @ mixer.o_proj.weight.T


def test_layer_and_gradients_equal_inverted_matrices() -> None:
    mixer = mixer_of(d_conv=3)
    x = torch.randn(2, 19, 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = mixer(x, everything(x)), token_by_token(mixer, x)
    assert_close(ours, theirs)
    w = torch.randn_like(ours)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    grads = [torch.autograd.grad(y, (x, *parameters), w) for y in (ours, theirs)]
    for name, own, other in zip(("x", *names), *grads, strict=True):
        assert_close(own, other, 1e-10, name)


def test_step_equals_forward() -> None:
    mixer = mixer_of()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    assert_close(run(mixer, x)[0], mixer(x, everything(x)))


def test_the_ridge_starts_at_one() -> None:
    mixer = Mesa(d_model=8, n_layers=1, length=8).blocks[0].mixer
    assert isinstance(mixer, MesaMixer)
    x = torch.zeros(1, 8)
    torch.testing.assert_close(mixer._views(x, x, x)[5], torch.ones(4, 2))


test_wrong_arguments_are_named = refuses(Mesa, d_model=8, n_layers=1, length=8)(
    ({"steps": 0}, "steps is 0; at least 1"),
    ({"n_heads": 3}, "n_heads is 3; a divisor of d_model, 8, unless"),
)
