"""sparse against the authors' masks and the dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import assert_dense, distances, load_lra, real_prefixes
from golden_tensors import golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.attention.sparse import Sparse, SparseMixer
from lra.attention import merge_heads
from lra.conformance.suite import check

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 36}


def seen_by(mixer: SparseMixer, length: int) -> Tensor:
    """The pattern itself, (H, L, L) bool: which values reach an output when keys and queries are zero."""
    q = torch.zeros(1, mixer.n_heads, length, length, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64).expand_as(q)
    return mixer.attend(q, q, v, torch.ones(1, length, dtype=torch.bool))[0] > 0


def test_fixed_equals_the_authors_code() -> None:
    g = golden("sparse_transformer_patterns")
    length, heads, size, stride = (int(g[f"cfg.{n}"]) for n in ("n", "H", "d", "stride"))
    columns, stripes = int(g["cfg.vertsize"]) * int(g["cfg.block"]), int(g["cfg.num_verts"])
    width = heads * size
    mixer = SparseMixer(
        width,
        n_heads=heads,
        width=width,
        positions="none",
        causal=True,
        pattern="fixed",
        stride=stride,
        summary=columns,
        length=length,
    )
    assert mixer.shape(length) == (stride, columns, stripes)
    assert torch.equal(seen_by(mixer, length), g["mid.blocksparse_fixed"])
    q, k, v = given = [g[f"in.{n}"].requires_grad_() for n in "qkv"]
    y = mixer.attend(q, k, v, torch.ones(1, length, dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    for n, found in zip("qkv", torch.autograd.grad(y, given, g["w"]), strict=True):
        torch.testing.assert_close(found, g[f"grad.{n}"], rtol=0, atol=1e-11)


def test_strided_heads_have_the_authors_masks() -> None:
    g = golden("sparse_transformer_patterns")
    length = int(g["cfg.n"])
    mixer = SparseMixer(
        16,
        n_heads=4,
        width=16,
        positions="none",
        causal=True,
        pattern="strided",
        stride=int(g["cfg.stride"]),
        summary=None,
        length=length,
    )
    near, far = seen_by(mixer, length).chunk(2)
    assert all(torch.equal(head, g["mid.dense_local"]) for head in near)
    assert all(torch.equal(head, g["mid.dense_strided"]) for head in far)


def test_fixed_equals_lra_s_once_the_first_columns_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    g = golden("lra_sparse_fixed")
    stride, summary, length = int(g["cfg.block"]), int(g["cfg.c"]), int(g["cfg.L"])
    mixer = SparseMixer(
        8,
        n_heads=int(g["cfg.H"]),
        width=8,
        positions="none",
        causal=True,
        pattern="fixed",
        stride=stride,
        summary=summary,
        length=length,
    )
    own = mixer.stripe
    monkeypatch.setattr(mixer, "shape", lambda _: (stride, summary, 1))
    monkeypatch.setattr(mixer, "stripe", lambda j, number: own(j, number) | (j % stride == 0))
    assert all(torch.equal(head, g["mid.pattern"]) for head in seen_by(mixer, length))
    x, rows = g["x"].requires_grad_(), g["mid.row_valid"]
    y = load_lra(mixer, g)(x, g["mask"] > 0)
    torch.testing.assert_close(y[rows], g["y"][rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-11)


def test_both_strided_heads_together_equal_lra_s() -> None:
    """Theirs is one softmax over what either kind of head sees, in every head."""
    g = golden("lra_sparse_strided")
    length, heads = int(g["cfg.L"]), int(g["cfg.H"])
    mixer = SparseMixer(
        8,
        n_heads=heads,
        width=8,
        positions="none",
        causal=True,
        pattern="strided",
        stride=int(g["cfg.block"]),
        summary=None,
        length=length,
    )
    pattern = seen_by(mixer, length).any(0)
    assert torch.equal(pattern, g["mid.pattern"])
    x, rows = g["x"].requires_grad_(), g["mid.row_valid"]
    q, k, v = load_lra(mixer, g).heads(x)
    y = mixer.out(merge_heads(F.scaled_dot_product_attention(q, k, v, pattern & (g["mask"] > 0)[:, None, None])))
    torch.testing.assert_close(y[rows], g["y"][rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-11)


def pattern_of(mixer: SparseMixer, length: int) -> Tensor:
    """From the docstring's conditions: (1, H, L, L)."""
    stride, summary, stripes = mixer.shape(mixer.length)
    apart, j = distances(length), torch.arange(length)
    if mixer.pattern == "strided":
        half = mixer.n_heads // 2
        sees = torch.stack([apart.abs() < stride] * half + [apart % stride == 0] * half)
    else:
        own = j // stride == (j // stride)[:, None]
        inside = j % stride
        starts = [stride - (h % stripes + 1) * summary for h in range(mixer.n_heads)]
        sees = torch.stack([own | ((inside >= s) & (inside < s + summary)) for s in starts])
    return (sees & (apart <= 0) if mixer.causal else sees)[None]


@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_equals_dense_definition(pattern: str, causal: bool, positions: str) -> None:
    mixer = SparseMixer(
        16, n_heads=4, width=16, positions=positions, causal=causal, pattern=pattern, stride=6, summary=2, length=33
    )
    assert_dense(mixer, pattern_of(mixer, 33), real_prefixes(33, 20, 1))


def test_two_layers_reach_everything() -> None:
    """The factorisation: any token reaches any later one in two steps, over a neighbour and a column."""
    for pattern in ("strided", "fixed"):
        mixer = SparseMixer(
            16, n_heads=4, width=16, positions="none", causal=True, pattern=pattern, stride=6, summary=2, length=33
        )
        once = seen_by(mixer, 33).any(0).double()
        assert torch.equal((once @ once > 0), distances(33) <= 0)


def test_stride_is_the_root_of_the_length() -> None:
    for length, stride, summary in ((1024, 32, 8), (4096, 64, 8), (16384, 128, 8), (100, 10, 2), (1, 1, 1)):
        mixer = SparseMixer(
            16,
            n_heads=4,
            width=16,
            positions="none",
            causal=False,
            pattern="fixed",
            stride=None,
            summary=None,
            length=length,
        )
        assert mixer.shape(length)[:2] == (stride, summary)


def test_with_small_strides_it_is_a_sound_encoder() -> None:
    for options in ({"pattern": "strided", "stride": 5}, {"pattern": "fixed", "stride": 7, "positions": "alibi"}):
        only = ["padding", "padding_length", "batch", "gradients", "causal", "step"]
        assert not [f.message for f in check("sparse", only=only, options=options) if f.failed]


test_wrong_arguments_are_named = refuses(Sparse, **SMALL)(
    ({"pattern": "random"}, "pattern is 'random'; one of strided, fixed"),
    ({"stride": 0}, "stride is 0; at least 1"),
    ({"pattern": "fixed", "summary": 7}, "summary is 7; at most the stride, 6"),
    ({"n_heads": 1}, "heads are of two kinds"),
)
