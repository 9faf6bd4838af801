"""gau and flash against tensors of an independent implementation, and the buckets of their distances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_stored_gradients, everything, golden
from stepping import run
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._relative import buckets
from lra.architectures.linear_attention.flash import Flash, FlashMixer
from lra.architectures.linear_attention.gau import GAU, GAUMixer
from lra.conformance.suite import check

NAMES = {
    "gau": {"gamma": "offsetscale.gamma", "beta": "offsetscale.beta", "to_out": "to_out.0"},
    "flash": {"gamma": "qk_offset_scale.gamma", "beta": "qk_offset_scale.beta", "to_out": "to_out"},
}
SETS = {"gau": "gau_quadratic", "flash": "flash_mixed_chunk"}
TABLE = "rel_pos_bias.relative_attention_bias.weight"


def theirs(kind: str, own: str) -> str:
    if own == "rel_pos_bias":
        return TABLE
    part, _, rest = own.partition(".")
    if part in ("to_hidden", "to_qk"):
        return f"{part}.0.{rest}"
    return NAMES[kind][part] + (f".{rest}" if rest else "")


def scale_of(kind: str, g: dict[str, Tensor]) -> float:
    """What our table of biases is over theirs: they multiply it, and one of them divides it with the scores."""
    if kind == "gau":
        return int(g["cfg.D"]) ** 0.5 / int(g["cfg.L"])
    return int(g["cfg.s"]) ** 0.5


def loaded(kind: str, g: dict[str, Tensor], causal: bool = False) -> tuple[nn.LayerNorm, Any]:
    width, qk, length = g["x"].shape[-1], int(g["cfg.s"]), int(g["cfg.L"])
    values = round(width * float(g["cfg.expansion"]))
    if kind == "gau":
        mixer: Any = GAUMixer(width, qk_dim=qk, width=values, length=length, causal=causal).double()
    else:
        mixer = FlashMixer(
            width, qk_dim=qk, width=values, chunk=int(g["cfg.group"]), length=length, causal=causal
        ).double()
    state = {own: g[f"param.{theirs(kind, own)}"].view(p.shape) for own, p in mixer.named_parameters()}
    state["rel_pos_bias"] = state["rel_pos_bias"] * scale_of(kind, g)
    mixer.load_state_dict(state)
    norm = nn.LayerNorm(width).double()
    norm.load_state_dict({name: g[f"param.norm.{name}"] for name in ("weight", "bias")})
    return norm, mixer


@pytest.mark.parametrize("kind", SETS)
def test_outputs_and_gradients_equal_an_independent_implementation(kind: str) -> None:
    """With padding, and its outputs: the mixer is given what the norm makes of all tokens."""
    g = golden(SETS[kind])
    (norm, mixer), x, gated = loaded(kind, g), g["x"].requires_grad_(), []
    mixer.to_out.register_forward_pre_hook(lambda _, inputs: gated.append(inputs[0]))
    y = x + mixer(norm(x), g["mask"])
    assert_close(gated[0], g["mid.gated"], 1e-12)
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"])
    assert_stored_gradients(norm, {name: g[f"grad.norm.{name}"] for name in ("weight", "bias")})
    stored = {own: g[f"grad.{theirs(kind, own)}"] for own, _ in mixer.named_parameters()}
    stored["rel_pos_bias"] = stored["rel_pos_bias"] / scale_of(kind, g)
    assert_stored_gradients(mixer, stored, 1e-10)


@pytest.mark.parametrize("kind", SETS)
def test_without_padding_and_causal(kind: str) -> None:
    g = golden(SETS[kind])
    for causal, key in ((False, "mid.y_no_mask"), (True, "mid.y_causal")):
        norm, mixer = loaded(kind, g, causal)
        y = g["x"] + mixer(norm(g["x"]), everything(g["x"]))
        assert_close(y, g[key], 1e-12)


@pytest.mark.parametrize("kind", SETS)
def test_steps_equal_an_independent_implementation(kind: str) -> None:
    g = golden(SETS[kind])
    norm, mixer = loaded(kind, g, True)
    assert_close(g["x"] + run(mixer, norm(g["x"]))[0], g["mid.y_causal"], 1e-12)


def test_attention_of_flash_before_masks() -> None:
    g = golden("flash_mixed_chunk")
    norm, mixer = loaded("flash", g)
    size = int(g["cfg.group"])
    h = norm(g["x"])
    q, _, k, _ = (F.pad(t, (0, 0, 0, -h.shape[1] % size)).unflatten(1, (-1, size)) for t in mixer.views(h)[2])
    place = torch.arange(size)
    a = mixer.weights(q @ k.mT / size, place[:, None] - place)
    full = h.shape[1] // size  # they fill the last chunk ahead of the maps
    assert_close(a[:, :full], g["mid.attn"][:, :full], 1e-12)


def test_buckets_are_those_of_t5() -> None:
    ago = torch.tensor([-200, -128, -9, -8, -1, 0, 1, 7, 8, 9, 127, 128, 200])
    assert buckets(ago, False).tolist() == [31, 31, 24, 24, 17, 0, 1, 7, 8, 8, 15, 15, 15]
    assert buckets(torch.tensor([-3, 0, 15, 16, 17, 127, 128, 500]), True).tolist() == [0, 0, 15, 16, 16, 31, 31, 31]


def test_flash_in_several_chunks_conforms() -> None:
    findings = check("flash", ["padding", "padding_length", "causal", "step", "cost"], {"chunk": 8})
    assert not [f"{f.check}: {f.message}" for f in findings if f.failed]
    findings = check("flash", ["step"], {"chunk": 8, "direction": "causal"})
    assert not [f"{f.check}: {f.message}" for f in findings if f.failed]


@pytest.mark.parametrize(
    ("make", "wrong", "says"),
    [
        (GAU, {"qk_dim": 0}, "qk_dim is 0; at least 1"),
        (GAU, {"expand": 0.0}, r"expand is 0\.0; at least one value"),
        (Flash, {"chunk": 0}, "chunk is 0; at least 1 token"),
        (Flash, {"direction": "shared"}, "direction is 'shared'; one of causal, bidirectional"),
    ],
)
def test_wrong_arguments_are_named(make: Any, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(d_model=8, n_layers=1, length=8, **wrong)
