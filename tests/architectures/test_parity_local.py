"""local against the package local-attention and the dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import assert_dense, distances, load_lra, real_prefixes
from golden_tensors import golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.attention.local import Local, LocalMixer
from lra.attention import attention_mask, merge_heads
from lra.conformance.suite import check
from lra.registry import architectures

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 24}


@pytest.mark.parametrize(
    ("name", "before", "after", "causal"),
    [("local_attn_block", 0, 0, False), ("local_attn_causal", 1, 0, True), ("local_attn_overlap", 1, 1, False)],
)
def test_equals_the_package(name: str, before: int, after: int, causal: bool) -> None:
    g = golden(name)
    heads, size = int(g["cfg.H"]), int(g["cfg.d"])
    mixer = LocalMixer(
        8,
        n_heads=heads,
        width=heads * size,
        positions="none",
        causal=causal,
        size=int(g["cfg.window"]),
        before=before,
        after=after,
    )
    q, k, v = given = [g[f"in.{n}"].requires_grad_() for n in "qkv"]
    y = mixer.attend(q, k, v, g["mask"] > 0)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    for n, found in zip("qkv", torch.autograd.grad(y, given, g["w"]), strict=True):
        torch.testing.assert_close(found, g[f"grad.{n}"], rtol=0, atol=1e-11)


def test_equals_lra_s_once_its_tokens_are_in_order() -> None:
    """A group of theirs is every (L / W)-th token, under the mask of a run of W; tokens it adds are zeros, and real."""
    g = golden("lra_local")
    size, missing = int(g["cfg.block"]), -int(g["cfg.L"]) % int(g["cfg.block"])
    mixer = load_lra(
        LocalMixer(8, n_heads=int(g["cfg.H"]), width=8, positions="none", causal=False, size=size, before=0, after=0), g
    )
    x = g["x"].requires_grad_()
    runs = F.pad(x, (0, 0, 0, missing)).unflatten(1, (size, -1)).transpose(1, 2).flatten(1, 2)
    y = mixer(runs, F.pad(g["mask"] > 0, (0, missing), value=True))
    y = y.unflatten(1, (-1, size)).transpose(1, 2).flatten(1, 2)[:, : int(g["cfg.L"])]
    rows = g["mid.row_valid"]
    assert not rows.all()
    torch.testing.assert_close(y[rows], g["y"][rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "after"), [("reformer_local", 1), ("reformer_local_causal", 0)])
def test_equals_the_local_layer_of_hugging_face_s_reformer(name: str, after: int) -> None:
    """Its blocks look around the ends, unless causal: here the last stands before the first, and the first after it."""
    g = golden(name)
    heads, chunk, causal = int(g["cfg.H"]), int(g["cfg.chunk"]), bool(g["cfg.causal"])
    width = heads * int(g["cfg.d"])
    mixer = LocalMixer(
        int(g["cfg.D"]),
        n_heads=heads,
        width=width,
        positions="none",
        causal=causal,
        size=chunk,
        before=int(g["cfg.before"]),
        after=after,
    ).double()
    weight = torch.cat([g[f"param.{n}.weight"] for n in ("query", "key", "value")])
    mixer.load_state_dict({**mixer.state_dict(), "qkv.weight": weight})
    x, reach = g["x"].requires_grad_(), 0 if causal else chunk

    def ring(t: Tensor, dim: int) -> Tensor:
        length = t.shape[dim]
        return torch.cat([t.narrow(dim, length - reach, reach), t, t.narrow(dim, 0, reach)], dim)

    q, k, v = (ring(t, 2) for t in mixer.heads(x))
    y = mixer.attend(q, k, v, ring(g["mask"] > 0, 1))
    y = merge_heads(y[:, :, reach : reach + x.shape[1]])
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_dense_definition(positions: str, causal: bool) -> None:
    mask = real_prefixes(23, 9, 1)
    plain = LocalMixer(16, n_heads=4, width=16, positions=positions, causal=causal, size=5, before=0, after=0)
    assert_dense(plain, attention_mask(torch.ones_like(mask), causal=causal, block=5), mask)
    block = torch.arange(23) // 5
    apart = block - block[:, None]
    sees = (apart >= -2) & (apart <= 1) & (distances(23) <= (0 if causal else 23))
    assert_dense(
        LocalMixer(16, n_heads=4, width=16, positions=positions, causal=causal, size=5, before=2, after=1),
        sees[None, None],
        mask,
    )


def test_nothing_passes_between_blocks() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(1, 24, 16), torch.ones(1, 24, dtype=torch.bool)
    other = x.clone()
    other[:, 0] = x[:, 0].flip(-1)
    for variant, reach in (("local", 8), ("local/overlap", 24)):
        encoder = architectures.get(variant)(**SMALL, size=8).eval()
        changed = (encoder(other, mask) - encoder(x, mask)).abs().amax(-1)[0] > 1e-5
        assert changed[:reach].all()
        assert not changed[reach:].any()


def test_the_cache_of_step_is_bounded() -> None:
    encoder = Local(**SMALL, size=4, before=1, direction="causal")
    state = encoder.init_state(1)
    for _ in range(24):
        _, state = encoder.step(torch.randn(1, 16), state)
        assert all(own[0].shape[2] <= 8 for own in state[1])


def test_with_small_blocks_it_is_a_sound_encoder() -> None:
    only = ["padding", "padding_length", "batch", "gradients", "causal", "step", "cost"]
    alibi = {"size": 5, "positions": "alibi"}
    for options in ({"size": 5}, alibi, {**alibi, "before": 1, "after": 2}):
        assert not [f.message for f in check("local", only=only, options=options) if f.failed]


test_wrong_arguments_are_named = refuses(Local, **SMALL)(
    ({"size": 0}, "size is 0; at least 1"),
    ({"after": -1}, "after is -1"),
)
