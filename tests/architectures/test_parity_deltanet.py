"""deltanet against tensors of the authors' layers and recurrences, the papers' products of matrices, and its start."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import assert_layer_as_stored, everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, run
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.linear_attention.deltanet import DeltaNet, DeltaNetMixer, advance
from lra.registry import architectures

LAYERS = ["deltanet_layer", "gated_deltanet_layer"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj")


def mixer_of(**own: Any) -> DeltaNetMixer:
    mixer = DeltaNet(**{"d_model": 12, "n_layers": 1, "length": 32, "n_heads": 3, **own}).blocks[0].mixer
    assert isinstance(mixer, DeltaNetMixer)
    return mixer


def gathered(g: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The authors' tensors under our names: their projections are rows of one map here, their filters of another."""
    found = {
        "in_proj.weight": torch.cat([g[f"{prefix}{p}.weight"] for p in PROJECTIONS if f"{prefix}{p}.weight" in g]),
        "conv1d.weight": torch.cat([g[f"{prefix}{p}_conv1d.weight"] for p in "qkv"]),
        "o_norm.weight": g[f"{prefix}o_norm.weight"],
        "o_proj.weight": g[f"{prefix}o_proj.weight"],
    }
    return found | {name: g[prefix + name] for name in ("A_log", "dt_bias") if prefix + name in g}


def loaded(name: str, g: dict[str, Tensor]) -> DeltaNetMixer:
    gated = name.startswith("gated")
    mixer = mixer_of(expand_k=0.75 if gated else 1.0, expand_v=1.5, gated=gated).double()
    mixer.load_state_dict(gathered(g, "param."))
    return mixer


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_authors(name: str) -> None:
    g = golden(name)
    assert_layer_as_stored(loaded(name, g), g, gathered(g, "grad.param."))


@pytest.mark.parametrize("name", LAYERS)
def test_step_equals_the_authors(name: str) -> None:
    g = golden(name)
    y, (_, state) = run(loaded(name, g), g["x"])
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, g["mid.final_state"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_recurrence_from_a_state_equals_the_authors(name: str) -> None:
    """Outputs, last state and every gradient; without gates they lay heads before time."""
    g = golden(name)
    names = [key for key in ("q", "k", "v", "beta", "g", "initial_state") if f"in.{key}" in g]
    inputs = [g[f"in.{key}"].requires_grad_() for key in names]
    axis = 1 if "g" in names else 2
    S, outputs = inputs[-1], []
    for t in range(inputs[0].shape[axis]):
        q, k, v, beta, *decay = (x.select(axis, t) for x in inputs[:-1])
        o, S = advance(q, k, v, beta, decay[0] if decay else None, S)
        outputs.append(o)
    y = torch.stack(outputs, axis)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(S, g["mid.final_state"], rtol=0, atol=1e-12)
    for key, found in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        torch.testing.assert_close(found, g[f"grad.{key}"], rtol=0, atol=1e-11)


def as_the_papers_write_it(mixer: DeltaNetMixer, x: Tensor) -> Tensor:
    """S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t / sqrt(K)."""
    heads, widths = mixer.n_heads, mixer.inner
    W_q, W_k, W_v, W_beta, *rest = mixer.in_proj.weight.split([*widths, *mixer.sizes[1:]])
    filtered = []
    for W, taps in zip((W_q, W_k, W_v), mixer.conv1d.weight.squeeze(1).split(widths), strict=True):
        u, number = x @ W.T, taps.shape[1]
        late = [torch.cat([torch.zeros_like(u[:, :j]), u[:, : u.shape[1] - j]], 1) for j in range(number)]
        y = torch.stack([taps[:, number - 1 - j] * late[j] for j in range(number)]).sum(0)
        filtered.append((y / (1 + torch.exp(-y))).unflatten(-1, (heads, -1)))
    q, k, v = filtered
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = (2 if mixer.negative else 1) / (1 + torch.exp(-x @ W_beta.T))
    alpha = torch.ones_like(beta)
    if rest:
        alpha = torch.exp(-mixer.A_log.exp() * torch.log1p(torch.exp(x @ rest[0].T + mixer.dt_bias)))
    eye, reads = torch.eye(q.shape[-1], dtype=x.dtype), []
    for b in range(x.shape[0]):
        S = x.new_zeros(heads, v.shape[-1], q.shape[-1])
        for t in range(x.shape[1]):
            key, rate = k[b, t].unsqueeze(-1), beta[b, t, :, None, None]
            S = S @ (alpha[b, t, :, None, None] * (eye - rate * key @ key.mT)) + rate * v[b, t].unsqueeze(-1) @ key.mT
            reads.append((S @ q[b, t].unsqueeze(-1)).squeeze(-1) / math.sqrt(q.shape[-1]))
    o = torch.stack(reads).unflatten(0, x.shape[:2])
    o = (o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.o_norm.weight).flatten(-2)
    if rest:
        gate = x @ rest[1].T
        o = o * gate / (1 + torch.exp(-gate))
    return o @ mixer.o_proj.weight.T


def test_recurrence_with_negative_eigenvalues_equals_the_authors() -> None:
    """The first of each token's keys, values and strengths in (0, 2)."""
    g = golden("deltaproduct")
    steps = int(g["cfg.num_householder"])
    k, v, beta = (g[f"in.{name}"][:, ::steps] for name in ("k", "v", "beta"))
    assert beta.max() > 1.5
    S, outputs = g["in.initial_state"], []
    for t in range(k.shape[1]):
        o, S = advance(g["in.q"][:, t], k[:, t], v[:, t], beta[:, t], None, S)
        outputs.append(o)
    torch.testing.assert_close(torch.stack(outputs, 1), g["mid.y_deltanet"], rtol=0, atol=1e-12)
    torch.testing.assert_close(S, g["mid.final_state_deltanet"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gated", "negative"), [(False, False), (True, False), (False, True), (True, True)])
def test_outputs_and_gradients_equal_the_products_of_the_papers(gated: bool, negative: bool) -> None:
    torch.manual_seed(0)
    mixer = mixer_of(expand_v=2.0, d_conv=3, gated=gated, negative=negative).double()
    with torch.no_grad():
        mixer.o_norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 21, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = mixer(x, everything(x)), as_the_papers_write_it(mixer, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(ours)
    inputs = (x, *mixer.parameters())
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("gated", [False, True])
def test_step_equals_forward_over_2048_tokens(gated: bool) -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(gated=gated), 12, rtol=1e-4, atol=1e-4)


def test_a_written_value_replaces_what_its_key_held() -> None:
    """beta = 1 on unit keys: the last value under a key is read back, whatever was there."""
    k = F.normalize(torch.randn(1, 1, 4, dtype=torch.float64), dim=-1)
    S = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    v = torch.randn(1, 1, 3, dtype=torch.float64)
    o, _ = advance(k, k, v, torch.ones(1, 1, dtype=torch.float64), None, S)
    torch.testing.assert_close(o, v / 2)


def test_initialisation_of_the_gates() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(d_model=2000, n_heads=2000, gated=True)
    A = mixer.A_log.exp()
    assert A.min() > 0
    assert A.max() <= 16 * (1 + 1e-6)
    assert abs(A.mean().item() - 8) < 0.5
    dt = F.softplus(mixer.dt_bias.double())
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert 0.0085 < dt.median() < 0.0118  # uniform in the logarithm: the geometric mean, 0.01


def test_initialisation_of_the_maps() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(d_model=48, d_conv=4)
    assert 0.99 < mixer.in_proj.weight.abs().max() * math.sqrt(48) <= 1 + 1e-6
    assert 0.98 < mixer.conv1d.weight.abs().max() * 2 <= 1
    assert (mixer.o_norm.weight == 1).all()


def test_gated_is_the_gated_paper() -> None:
    encoder = architectures.get("deltanet/gated")(d_model=16, n_layers=1, length=8)
    assert isinstance(encoder, DeltaNet)
    mixer = encoder.blocks[0].mixer
    assert isinstance(mixer, DeltaNetMixer)
    assert mixer.inner == (12, 12, 24)
    assert mixer.sizes == (48, 4, 4, 24)


def test_weight_decay_spares_decays_steps_biases_and_norms() -> None:
    encoder = DeltaNet(d_model=8, n_layers=1, length=8, gated=True)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    rest = {name for name, _ in encoder.named_parameters() if name.endswith("bias") or "norm" in name}
    assert own == {"layers.0.mixer.A_log", "layers.0.mixer.dt_bias"} | rest
    assert all(settings == {"weight_decay": 0.0} for settings in encoder.optim.values())
    assert not DeltaNet(d_model=8, n_layers=1, length=8).optim


test_wrong_arguments_are_named = refuses(DeltaNet, d_model=8, n_layers=1, length=8)(
    ({"n_heads": 0}, "n_heads is 0; at least 1"),
    ({"d_conv": 0}, "d_conv is 0; at least 1"),
    ({"n_heads": 3}, r"expand_k is 1\.0; times d_model, 8, it is a multiple of n_heads, 3"),
    ({"expand_k": 0.3}, r"expand_k is 0\.3"),
    ({"expand_v": 0.0}, r"expand_v is 0\.0"),
)
