"""retnet against tensors of the authors' layer, its recurrence step by step, and the properties of its start.

The authors divide the rows of the scores by positive numbers, which the norm after them undoes but for its epsilon.
"""

from __future__ import annotations

import math

import pytest
import torch
from golden_tensors import everything, golden
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor

from lra.architectures.linear_attention.retnet import RetNet, RetNetMixer
from lra.kernels.decay_attention import decay_attention

PARTS = ("q_proj", "k_proj", "v_proj", "g_proj")


def loaded(g: dict[str, Tensor]) -> RetNetMixer:
    mixer = RetNetMixer(12, n_heads=3, value_dim=24).double()
    into = torch.cat([g[f"param.{part}.weight"] for part in PARTS])
    mixer.load_state_dict({"in_proj.weight": into, "out_proj.weight": g["param.out_proj.weight"]})
    return mixer


def test_decays_are_those_of_the_authors() -> None:
    g, mixer = golden("retnet_multiscale_retention"), loaded(golden("retnet_multiscale_retention"))
    gamma = mixer.log_decay().exp()
    torch.testing.assert_close(gamma, torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], dtype=torch.float64))
    # a row of their mask is divided by one number: the ratio of neighbours in a row stays
    mask = g["mid.decay_mask"]
    torch.testing.assert_close(mask[:, -1, :-1] / mask[:, -1, 1:], gamma[:, None].expand(3, 13))


def test_retention_equals_the_authors_once_their_divisors_are_put_in() -> None:
    g = golden("retnet_multiscale_retention")
    mixer = loaded(g)
    q, k, v, gate = mixer._projected(g["x"], 0)
    o = decay_attention(q, k, v, mixer.log_decay())
    assert isinstance(o, Tensor)
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * 4**-0.5 * g["mid.decay_mask"]
    divisor = scores.abs().sum(-1).clamp(min=1, max=5e4)
    plain = mixer.log_decay()[:, None] * torch.arange(14)
    rows = plain.exp().cumsum(-1).sqrt() * divisor  # (B, H, L): the root of a row's sum of gamma^(n - m), and the above
    torch.testing.assert_close(o / rows.transpose(1, 2).unsqueeze(-1), g["mid.retention"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mixer.finish(g["mid.retention"], gate), g["y"], rtol=1e-11, atol=1e-12)


def test_layer_equals_the_authors_to_the_epsilon_of_the_norm() -> None:
    """The norm adds 1e-6 to mean squares, which after their divisors are 0.05 or more: a relative 1e-5."""
    assert golden("retnet_multiscale_retention")["mid.retention"].square().mean(-1).min() > 0.04
    g = golden("retnet_multiscale_retention")
    mixer, x = loaded(g), g["x"].requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-4)
    (y * g["w"]).sum().backward()
    pairs = [(x.grad, g["grad.x"]), (mixer.out_proj.weight.grad, g["grad.param.out_proj.weight"])]
    assert mixer.in_proj.weight.grad is not None
    into = mixer.in_proj.weight.grad.split(mixer.sizes)
    pairs += [(own, g[f"grad.param.{part}.weight"]) for own, part in zip(into, PARTS, strict=True)]
    for own, other in pairs:
        assert own is not None
        assert (own - other).norm() < 2e-5 * other.norm()


def test_outputs_and_gradients_equal_the_recurrence() -> None:
    g = golden("retnet_multiscale_retention")
    mixer, x = loaded(g), g["x"].requires_grad_()
    recurrent, parallel = stepped(mixer, x), mixer(x, everything(x))
    torch.testing.assert_close(parallel, recurrent, rtol=1e-11, atol=1e-12)
    inputs = (x, *mixer.parameters())
    grads = [torch.autograd.grad((y * g["w"]).sum(), inputs) for y in (parallel, recurrent)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(RetNetMixer(8, n_heads=2, value_dim=8), 8, rtol=1e-4, atol=2e-5)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = RetNetMixer(64, n_heads=8, value_dim=128)
    for weight in mixer.in_proj.weight.split(mixer.sizes):
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < weight.abs().max() <= bound
    assert 0.99 < mixer.out_proj.weight.abs().max() * math.sqrt((64 + 128) / 6) / 0.5 <= 1


def test_wrong_heads_are_named() -> None:
    with pytest.raises(ValueError, match="n_heads is 8; d_model, 24"):
        RetNet(d_model=24, n_layers=1, length=16)
    with pytest.raises(ValueError, match="value_dim is 20"):
        RetNet(d_model=16, n_layers=1, length=16, value_dim=20)
