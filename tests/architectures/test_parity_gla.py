"""gla against tensors of the authors' layer and recurrence, the paper's parallel form, and the gates it starts with."""

from __future__ import annotations

import math
from typing import Any

import torch
from golden_tensors import assert_layer_as_stored, everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, run
from torch import Tensor

from lra.architectures.linear_attention.gla import GLA, GLAMixer, advance

PROJECTIONS = ("q_proj", "k_proj", "k_gate.0", "v_proj", "g_proj")
SCALE = (12 / 3) ** -0.5
"""What the authors' layer multiplies its keys with, D = 12 and H = 3."""


def mixer_of(**own: Any) -> GLAMixer:
    mixer = GLA(**{"d_model": 12, "n_layers": 1, "length": 32, "n_heads": 3, **own}).blocks[0].mixer
    assert isinstance(mixer, GLAMixer)
    return mixer


def gathered(g: dict[str, Tensor], prefix: str, key_scale: float) -> dict[str, Tensor]:
    """The authors' tensors under our names, their keys times `key_scale`."""
    rows = [g[f"{prefix}{p}.weight"] * (key_scale if p == "k_proj" else 1) for p in PROJECTIONS]
    return {
        "in_proj.weight": torch.cat(rows),
        "k_gate.weight": g[f"{prefix}k_gate.1.weight"],
        "k_gate.bias": g[f"{prefix}k_gate.1.bias"],
        "g_bias": g[f"{prefix}g_proj.bias"],
        "out_proj.weight": g[f"{prefix}out_proj.weight"],
    }


def loaded(g: dict[str, Tensor]) -> GLAMixer:
    mixer = mixer_of().double()
    mixer.load_state_dict(gathered(g, "param.", SCALE))
    return mixer


def test_layer_equals_the_authors() -> None:
    g = golden("gla_layer")
    assert_layer_as_stored(loaded(g), g, gathered(g, "grad.param.", 1 / SCALE))


def test_step_equals_the_authors() -> None:
    g = golden("gla_layer")
    y, state = run(loaded(g), g["x"])
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, g["mid.final_state"], rtol=0, atol=1e-12)


def test_recurrence_from_a_state_equals_the_authors() -> None:
    g = golden("gla")
    names = ("q", "k", "v", "gk", "initial_state")
    inputs = [g[f"in.{key}"].requires_grad_() for key in names]
    S, outputs = inputs[-1], []
    for q, k, v, log_alpha in zip(*(x.unbind(1) for x in inputs[:-1]), strict=True):
        o, S = advance(q, k, v, log_alpha, S)
        outputs.append(o)
    y = torch.stack(outputs, 1)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(S, g["mid.final_state"], rtol=0, atol=1e-12)
    for key, found in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        torch.testing.assert_close(found, g[f"grad.{key}"], rtol=0, atol=1e-11)


def in_parallel(mixer: GLAMixer, x: Tensor) -> Tensor:
    """O = ((Q * B)(K / B)^T * M) V / sqrt(K), B_t the product of the gates through t, M causal."""
    W_q, W_k, W_1, W_v, W_r = mixer.in_proj.weight.split(mixer.sizes)
    alpha = torch.sigmoid(x @ W_1.T @ mixer.k_gate.weight.T + mixer.k_gate.bias) ** (1 / mixer.tau)
    parts = (x @ W_q.T, x @ W_k.T, x @ W_v.T, alpha.cumprod(1))
    q, k, v, B = (t.unflatten(-1, (mixer.n_heads, -1)).transpose(1, 2) for t in parts)
    o = ((q * B) @ (k / B).mT).tril() @ v / math.sqrt(q.shape[-1])
    o = o - o.mean(-1, keepdim=True)
    o = (o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()).transpose(1, 2).flatten(-2)
    r = x @ W_r.T + mixer.g_bias
    return (r * torch.sigmoid(r) * o) @ mixer.out_proj.weight.T


def test_outputs_and_gradients_equal_the_parallel_form() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(expand_k=0.75, expand_v=1.5, gate_rank=5, tau=4.0).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.4)
    x = torch.randn(2, 21, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = mixer(x, everything(x)), in_parallel(mixer, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    cotangent = torch.randn_like(ours)
    inputs = (x, *mixer.parameters())
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(), 12, rtol=1e-4, atol=1e-4)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(d_model=48)
    own = mixer.in_proj.weight.split(mixer.sizes)
    for weight in (*own[:3], mixer.k_gate.weight):
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert 0.97 * bound < weight.abs().max() <= bound
    for weight in (*own[3:], mixer.out_proj.weight):
        assert 0.98 < weight.abs().max() * math.sqrt(48) <= 1 + 1e-6
    assert not mixer.k_gate.bias.any()
    assert not mixer.g_bias.any()


def test_a_gate_half_open_holds_a_value_over_24_tokens() -> None:
    mixer = mixer_of()
    log_alpha = mixer._projected(torch.zeros(1, 12))[3]
    torch.testing.assert_close(log_alpha, torch.full((1, 3, 2), -math.log(2) / 16))
    assert 23 < (1 / (1 - log_alpha.exp())).max() < 24


test_wrong_arguments_are_named = refuses(GLA, d_model=8, n_layers=1, length=8)(
    ({"n_heads": 0}, "n_heads is 0; at least 1"),
    ({"gate_rank": 0}, "gate_rank is 0; at least 1"),
    ({"tau": 0.0}, r"tau is 0\.0; more than 0"),
    ({"n_heads": 8}, r"expand_k is 0\.5; times d_model, 8, it is a multiple of n_heads, 8"),
    ({"expand_k": 0.3}, r"expand_k is 0\.3"),
    ({"expand_v": 0.75, "n_heads": 4}, r"expand_v is 0\.75"),
)
