"""longformer against Hugging Face's layer, the authors' dilated pattern, the LRA code and the dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import assert_dense, distances, real_prefixes
from golden_tensors import golden
from refusals import refuses
from torch import Tensor

from lra.architectures.attention.longformer import Longformer, LongformerMixer
from lra.conformance.suite import check

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 24}


def mixer_of(window: int, n_global: int, *, causal: bool = False, positions: str = "none") -> LongformerMixer:
    return LongformerMixer(
        16,
        n_heads=4,
        width=16,
        positions=positions,
        causal=causal,
        window=window,
        dilation=[1, 1, 2, 3],
        n_global=n_global,
    )


def test_equals_hugging_face() -> None:
    """The row of their batch whose one global token is the first; its tail is padding."""
    g = golden("longformer_selfattn")
    heads, width = int(g["cfg.H"]), g["x"].shape[2]
    mixer = LongformerMixer(
        width,
        n_heads=heads,
        width=width,
        positions="none",
        causal=False,
        window=int(g["cfg.window"]) // 2,
        dilation=[1] * heads,
        n_global=1,
    ).double()
    assert mixer.qkv_global is not None
    for own, suffix in ((mixer.qkv, ""), (mixer.qkv_global, "_global")):
        theirs = {
            kind: torch.cat([g[f"param.{part}{suffix}.{kind}"] for part in ("query", "key", "value")])
            for kind in ("weight", "bias")
        }
        own.load_state_dict(theirs)
    torch.nn.init.eye_(mixer.out.weight)
    torch.nn.init.zeros_(mixer.out.bias)
    assert (g["mask"][1] == 2).nonzero().flatten().tolist() == [0]
    x, mask = g["x"][1:].requires_grad_(), g["mask"][1:] > 0
    y = mixer(x, mask).masked_fill(~mask[..., None], 0)
    torch.testing.assert_close(y, g["y"][1:], rtol=0, atol=1e-12)
    (y * g["w"][1:]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"][1:], rtol=0, atol=1e-11)


def test_equals_the_authors_dilated_pattern() -> None:
    g = golden("longformer_dilated")
    dilation, window = g["cfg.dilation"].tolist(), int(g["cfg.w"])
    given = [g[f"in.{n}"].requires_grad_() for n in "qkv"]
    mask = torch.ones(g["y"].shape[:2], dtype=torch.bool)
    for causal, expected in ((False, "y"), (True, "mid.y_causal")):
        mixer = LongformerMixer(
            15, n_heads=3, width=15, positions="none", causal=causal, window=window, dilation=dilation, n_global=0
        )
        q, k, v = (t.transpose(1, 2) for t in given)
        y = mixer.attend(q, k, v, mask).transpose(1, 2)
        torch.testing.assert_close(y, g[expected], rtol=0, atol=1e-12)
        if not causal:
            for n, found in zip("qkv", torch.autograd.grad(y, given, g["w"]), strict=True):
                torch.testing.assert_close(found, g[f"grad.{n}"], rtol=0, atol=1e-11)


def pattern(length: int, window: int, n_global: int, causal: bool) -> Tensor:
    """Who sees whom, heads of dilation 1, 1, 2, 3: (1, 4, L, L)."""
    apart, step = distances(length), torch.tensor([1, 1, 2, 3])[:, None, None]
    sees = (apart % step == 0) & (apart.abs() <= window * step)
    first = torch.arange(length) < n_global
    sees = sees | first | first[:, None]
    return (sees & (apart <= 0) if causal else sees)[None]


@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
def test_causal_equals_dense_definition(positions: str) -> None:
    for n_global in (0, 2):
        mixer = mixer_of(3, n_global, causal=True, positions=positions)
        assert_dense(mixer, pattern(23, 3, n_global, True), real_prefixes(23, 9, 1))
    assert_dense(mixer_of(3, 0, positions=positions), pattern(23, 3, 0, False), real_prefixes(23, 9, 1))


@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
def test_global_tokens_equal_dense_definition(positions: str) -> None:
    """Rows of global tokens are softmax attention with projections of their own; the others have the ordinary ones."""
    torch.manual_seed(0)
    mixer, plain = (mixer_of(3, 2, positions=positions).double() for _ in range(2))
    assert mixer.qkv_global is not None
    assert plain.qkv_global is not None
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    mask = real_prefixes(23, 9, 1)
    x = torch.randn(3, 23, 16, dtype=torch.float64).masked_fill(~mask[..., None], 0).requires_grad_()
    given = [x, *mixer.parameters()]
    sees = pattern(23, 3, 2, False) & mask[:, None, None]
    bias = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    if mixer.slopes is not None:
        bias = bias - mixer.slopes[:, None, None] * distances(23).abs()
    local = torch.nn.functional.scaled_dot_product_attention(*mixer.heads(x), bias)
    ordinary, mixer.qkv = mixer.qkv, mixer.qkv_global
    rows = torch.nn.functional.scaled_dot_product_attention(*mixer.heads(x), bias)
    mixer.qkv = ordinary
    dense = mixer.out(torch.cat([rows[:, :, :2], local[:, :, 2:]], dim=2).transpose(1, 2).flatten(2))[mask]
    y = mixer(x, mask)[mask]
    torch.testing.assert_close(y, dense, rtol=0, atol=1e-11)
    weight = torch.randn_like(y)
    for one, two in zip(*(torch.autograd.grad(t, given, weight) for t in (y, dense)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_global_projections_start_as_copies() -> None:
    mixer = mixer_of(3, 1)
    assert mixer.qkv_global is not None
    assert torch.equal(mixer.qkv_global.weight, mixer.qkv.weight)
    assert mixer_of(3, 0).qkv_global is None


def test_dilation_rises_in_the_upper_half() -> None:
    layers = Longformer(d_model=16, n_layers=12, length=8, dilation=4).blocks
    steps = [layer.mixer.dilation for layer in layers if isinstance(layer.mixer, LongformerMixer)]
    assert [s[-1] for s in steps] == [1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [s[0] for s in steps] == [1] * 12


def test_the_cache_of_step_is_bounded_without_global_tokens() -> None:
    encoder = Longformer(**SMALL, window=3, n_global=0, direction="causal")
    state = encoder.init_state(1)
    for _ in range(24):
        _, state = encoder.step(torch.randn(1, 16), state)
        assert all(own[0].shape[2] <= 3 for own in state[1])


def test_with_small_windows_it_is_a_sound_encoder() -> None:
    for options in ({"window": 3, "dilation": 2}, {"window": 3, "n_global": 0}, {"window": 2, "positions": "alibi"}):
        only = ["padding", "padding_length", "batch", "gradients", "causal", "step", "cost"]
        assert not [f.message for f in check("longformer", only=only, options=options) if f.failed]


test_wrong_arguments_are_named = refuses(Longformer, **SMALL)(
    ({"window": 0}, "window is 0; at least 1"),
    ({"n_global": -1}, "n_global is -1; at least 0"),
)
