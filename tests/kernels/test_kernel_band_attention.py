"""`band_attention` against the published code of Longformer, BigBird and local attention, and what only it promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.kernels.band_attention import band_attention, cpu
from lra.kernels.band_attention.reference import allowed
from lra.kernels.band_attention.tiles import Pattern, pairs, tiles

IMPLEMENTATIONS = ["reference", "cpu"]


def close(found: Tensor, wanted: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=atol)


def heads(x: Tensor, z: dict[str, Tensor], name: str) -> Tensor:
    """A linear projection of x: (B, L, D), in heads: (B, L, H, E)."""
    y = F.linear(x, z[f"param.{name}.weight"], z[f"param.{name}.bias"])
    return y.unflatten(-1, (int(z["cfg.H"]), -1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_longformer_dilated(impl: str) -> None:
    """A dilation per head; `window` is one-sided here, as in the authors' kernel."""
    z = golden("longformer_dilated")
    q, k, v = (z[f"in.{n}"].requires_grad_() for n in "qkv")
    window, dilation = int(z["cfg.w"]), z["cfg.dilation"].tolist()
    y = band_attention(q, k, v, None, window, dilation, impl=impl)
    close(y, z["y"])
    for name, found in zip("qkv", torch.autograd.grad(y, (q, k, v), z["w"]), strict=True):
        close(found, z[f"grad.{name}"])
    close(band_attention(q, k, v, None, (window, 0), dilation, causal=True, impl=impl), z["mid.y_causal"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_longformer_layer(impl: str) -> None:
    """Global tokens anywhere, other places in each row; their own rows come from projections of their own. The
    published `window` counts both sides."""
    z = golden("longformer_selfattn")
    x = z["x"].requires_grad_()
    real, is_global = z["mask"] > 0, z["mask"] == 2
    q, k, v = (heads(x, z, name) for name in ("query", "key", "value"))
    y = band_attention(q, k, v, real, int(z["cfg.window"]) // 2, global_mask=is_global, impl=impl)
    q, k, v = (heads(x, z, f"{name}_global").transpose(1, 2) for name in ("query", "key", "value"))
    rows = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)
    y = torch.where(is_global[..., None, None], rows, y).flatten(2) * real.unsqueeze(-1)
    close(y, z["y"])
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lra_longformer(impl: str) -> None:
    """An even window W of Long Range Arena's own code: W - W // 2 - 1 keys behind, W // 2 ahead."""
    z = golden("lra_longformer")
    x = z["x"].requires_grad_()
    real, is_global = z["mask"] > 0, z["in.global_mask"] > 0

    def project(name: str) -> Tensor:
        return torch.einsum("bld,dhe->blhe", x, z[f"param.{name}.kernel"]) + z[f"param.{name}.bias"]

    width = int(z["cfg.window"])
    q, k, v = (project(f"{name}_sliding_window") for name in ("query", "key", "value"))
    y = band_attention(q, k, v, real, (width - width // 2 - 1, width // 2), global_mask=is_global, impl=impl)
    q, k, v = (project(f"{name}_global").transpose(1, 2) for name in ("query", "key", "value"))
    rows = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)
    y = torch.where(is_global[..., None, None], rows, y)
    y = torch.einsum("blhe,hed->bld", y, z["param.out.kernel"]) + z["param.out.bias"]
    valid = z["mid.row_valid"].unsqueeze(-1)
    close(torch.where(valid, y, 0), torch.where(valid, z["y"], 0))
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bigbird(impl: str) -> None:
    """Blocks: one on each side, the first and the last global, the drawn ones for the rows between."""
    z = golden("bigbird_block_sparse")
    x, block = z["x"].requires_grad_(), int(z["cfg.block"])
    real = z["mask"] > 0
    blocks = x.shape[1] // block
    random = F.pad(z["mid.rand_blocks"].long(), (0, 0, 1, 1), value=-1)
    ends = torch.zeros_like(real)
    ends[:, -block:] = True
    q, k, v = (heads(x, z, name) for name in ("query", "key", "value"))
    options: dict[str, Any] = {"n_global": block, "global_mask": ends, "random_blocks": random, "block": block}
    y = band_attention(q, k, v, real, 1, **options, impl=impl).flatten(2) * real.unsqueeze(-1)
    assert random.shape[1] == blocks
    close(y, z["y"])
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "window", "whole", "causal"),
    [
        ("local_attn_block", 0, True, False),
        ("local_attn_causal", (1, 0), True, True),
        ("local_attn_overlap", 1, True, False),
        ("local_attn_causal_exact", None, False, True),
        ("local_attn_overlap_exact", None, False, False),
    ],
)
def test_local_attention(name: str, window: int | tuple[int, int] | None, whole: bool, causal: bool, impl: str) -> None:
    """Whole windows of `cfg.window` positions, or exactly as many keys on each side."""
    z = golden(name)
    size = int(z["cfg.window"])
    q, k, v = given = [z[f"in.{n}"].transpose(1, 2).requires_grad_() for n in "qkv"]
    options: dict[str, Any] = {"block": size if whole else 1, "causal": causal, "impl": impl}
    y = band_attention(q, k, v, z["mask"] > 0, size if window is None else window, **options).transpose(1, 2)
    close(y, z["y"])
    for n, found in zip("qkv", torch.autograd.grad(y, given, z["w"]), strict=True):
        close(found.transpose(1, 2), z[f"grad.{n}"])


@pytest.mark.parametrize(
    "options",
    [
        {"window": (3, 2), "n_global": 1, "global_mask": torch.arange(30) == torch.tensor([[7], [2]])},
        {"window": 1, "block": 4, "dilation": [2, 1], "random_blocks": torch.arange(32).view(2, 8, 2) * 5 % 8},
        {"window": (3, 0), "n_global": 2, "causal": True},
        {"window": (1, 0), "block": 4, "random_blocks": torch.arange(32).view(2, 8, 2) * 5 % 8, "causal": True},
        {"window": 2, "n_global": 3, "mutual": False},
    ],
    ids=["globals", "random blocks", "causal globals", "causal random blocks", "one-way globals"],
)
def test_slopes(options: dict[str, Any]) -> None:
    """ALiBi in every part of the pattern: q . k - slope |i - j|, outputs and gradients."""
    torch.manual_seed(0)
    q, k, v = given = [torch.randn(2, 30, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    real = torch.arange(30) < torch.tensor([[30], [19]])
    weight = torch.randn(2, 30, 2, 4, dtype=torch.float64)
    found = {}
    for impl in IMPLEMENTATIONS:
        y = band_attention(q, k, v, real, slopes=torch.tensor([0.5, 0.1]).double(), impl=impl, **options)
        found[impl] = [y, *torch.autograd.grad(y, given, weight)]
    for one, two in zip(*found.values(), strict=True):
        close(one, two)
    plain = band_attention(q, k, v, real, **options)
    assert (plain - found["cpu"][0]).abs().max() > 0.1


def test_slopes_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 2, 4, dtype=torch.float64)
    slopes, i = torch.tensor([0.5, 0.1], dtype=torch.float64), torch.arange(9)
    bias = -slopes[:, None, None] * (i - i[:, None]).abs()
    wanted = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias[None])
    close(band_attention(q, k, v, None, 9, slopes=slopes).transpose(1, 2), wanted)


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 1, "n_global": 2}], ids=str)
def test_autocast_leaves_the_products_alone(options: dict[str, Any]) -> None:
    """Half-precision inputs, single-precision arithmetic: forward and backward."""
    torch.manual_seed(0)
    q, k, v = given = [torch.randn(1, 30, 2, 16).bfloat16().requires_grad_() for _ in range(3)]
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = band_attention(q, k, v, None, **options)
            found[enabled] = [y, *torch.autograd.grad(y, given, torch.ones_like(y))]
    assert all(torch.equal(one, two) for one, two in zip(*found.values(), strict=True))


def test_pairs_are_counted() -> None:
    """The number of pairs the pattern lets in, where its parts do not overlap."""
    for behind, ahead, dilation in ((2, 0, [1]), (1, 3, [1, 2]), (40, 40, [3])):
        sees = allowed(None, 1, 30, (behind, ahead), dilation, 0, None, None, 1, False, True, torch.device("cpu"))
        assert pairs(30, behind, ahead, dilation, 0, 0, 1) == sees.sum()
    assert pairs(30, 0, 0, [1, 1], 3, 2, 5) == 2 * (30 * 5 + 30 * 3 + 30 * 2 * 5)


def test_rows_of_a_long_sequence() -> None:
    """L = 16,384, window 512, float32: a few rows and the gradients they cause, against those rows alone in float64."""
    length, window = 16384, 512
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 1, 16).requires_grad_() for _ in range(3))
    rows = torch.tensor([0, 511, 513, 8191, 8192, 15872, 16383])
    y = band_attention(q, k, v, None, window)[:, rows]
    weight = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (q, k, v), weight)]
    near = (torch.arange(length) - rows.unsqueeze(1)).abs() <= window
    q, k, v = wide = [t.detach().double().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    dense = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=near)
    wanted = [dense, *torch.autograd.grad(dense, wide, weight.double().transpose(1, 2))]
    for one, two in zip(found, wanted, strict=True):
        error = (one.double() - two.transpose(1, 2)).square().mean() / two.square().mean()
        assert error.sqrt() < 1e-5


def test_padding_is_never_looked_at() -> None:
    torch.manual_seed(0)
    real = torch.arange(40) < torch.tensor([[40], [23]])
    random = torch.randint(0, 10, (2, 10, 2))
    q, k, v = torch.randn(3, 2, 40, 2, 4)
    options: dict[str, Any] = {"n_global": 2, "random_blocks": random, "block": 4}
    before = band_attention(q, k, v, real, 1, **options)
    for x in (k, v):
        x[~real] = 1e6
    torch.testing.assert_close(band_attention(q, k, v, real, 1, **options), before)


def test_a_row_that_sees_nothing_is_zero_and_takes_no_gradient() -> None:
    q, k, v = (torch.randn(1, 9, 1, 4, requires_grad=True) for _ in range(3))
    y = band_attention(q, k, v, torch.arange(9).unsqueeze(0) < 2, 1)
    assert (y[:, 3:] == 0).all()
    gradients = torch.autograd.grad(y.sum(), (q, k, v))
    assert (gradients[0][:, 3:] == 0).all()
    assert all(t.isfinite().all() for t in gradients)


class Largest(TorchDispatchMode):
    """The most numbers in any one tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_memory_is_linear_in_the_length(dropout: float) -> None:
    """No tensor of L x L or L x window x head size numbers, forward or backward."""
    length, window, size = 4096, 64, 8
    q, k, v = torch.randn(3, 1, length, 1, size)
    given = (None, None, None, None, torch.tensor(7) if dropout else None)
    pattern = (window, window, [1], 1, False, True, 1.0, dropout, False)
    forward: Callable[..., tuple[Tensor, Tensor]] = cpu.attend.__wrapped__._init_fn  # type: ignore[attr-defined]
    backward: Callable[..., tuple[Tensor, ...]] = cpu.attend_backward._init_fn
    with Largest() as largest:
        out, lse = forward(q, k, v, *given, *pattern)
        backward(torch.ones_like(out), out, lse, q, k, v, *given, *pattern)
    assert largest.numbers < 4 * length * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": -1}, "window is -1; expected 0 or more"),
        ({"dilation": [1]}, r"dilation is \[1\]; expected 1 or more, once or for 2 heads"),
        ({"dilation": 0}, "dilation is 0; expected 1 or more"),
        ({"block": 0}, "block is 0; expected 1 or more"),
        ({"dropout": 1.0}, r"dropout is 1\.0; expected from 0 up to, not including, 1"),
        ({"n_global": 9}, "n_global is 9; expected 0 to 8"),
        ({"mask": torch.ones(1, 8)}, r"mask is \(1, 8\) torch.float32 on cpu; expected \(1, 8\) torch.bool on cpu"),
        ({"random_blocks": torch.zeros(2, 8, 1)}, r"random_blocks is .*; expected \(2, 8, r\) integer"),
        ({"random_blocks": torch.full((2, 8, 1), 8)}, "random_blocks is up to 8; expected numbers below 8"),
        ({"slopes": torch.zeros(3)}, r"slopes is \(3,\) torch.float32 on cpu; expected \(2,\) on cpu"),
        ({"v": torch.zeros(1, 7, 2, 4)}, r"v is \(1, 7, 2, 4\); expected \(1, 8, 2, V\)"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(1, 8, 2, 4) for name in "qkv"} | {"mask": None, "window": 2}
    with pytest.raises(ValueError, match=message):
        band_attention(**(good | arguments))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_keeps_its_digits_at_length_16384(dtype: torch.dtype, tolerance: float) -> None:
    """Against the keys of each window laid side by side, in float64: an L x L matrix would not fit."""
    torch.manual_seed(0)
    length, reach, size = 16384, 5, 4
    given = [torch.randn(1, length, 2, size).to(dtype) for _ in range(4)]
    q, k, v = (t.double().requires_grad_() for t in given[:3])

    def windows(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1)  # (B, L, H, E, 2 reach + 1)

    there = windows(torch.ones(1, length, 1, 1))[:, :, 0] > 0
    scores = torch.einsum("blhe,blhen->blhn", q, windows(k)) * size**-0.5
    weights = scores.masked_fill(~there, -torch.inf).softmax(-1)
    wanted = torch.einsum("blhn,blhen->blhe", weights, windows(v))
    wanted_all = [wanted, *torch.autograd.grad(wanted, (q, k, v), given[3].double())]
    q, k, v = (t.clone().requires_grad_() for t in given[:3])
    found = band_attention(q, k, v, None, reach, impl="cpu")
    found_all = [found, *torch.autograd.grad(found, (q, k, v), given[3])]
    for own, right in zip(found_all, wanted_all, strict=True):
        error = (own.double() - right).square().mean().sqrt() / right.square().mean().sqrt()
        assert error < tolerance


PATTERNS: list[dict[str, Any]] = [
    {"window": 3, "n_global": 1},
    {"window": 1, "block": 4, "n_global": 2, "random_blocks": torch.tensor([[[2], [-1], [0]], [[2], [2], [0]]])},
    {"window": 2, "dilation": [1, 2], "causal": True},
]


@pytest.mark.parametrize("options", PATTERNS)
def test_dropout_is_differentiated_with_the_masks_of_the_forward_pass(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 12, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.arange(12) < torch.tensor([[12], [7]])

    def seeded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return band_attention(q, k, v, mask, dropout=0.4, **options)

    assert torch.autograd.gradcheck(seeded, given)
    q, k, v = given
    assert not torch.equal(seeded(q, k, v), band_attention(q, k, v, mask, **options))


def test_dropout_is_an_operator_like_any_other() -> None:
    q, k, v = (torch.randn(1, 6, 2, 3, requires_grad=True) for _ in range(3))
    given = (q, k, v, None, None, None, None, torch.tensor(7), 2, 2, [1, 1], 1, False, True, 1.0, 0.3, False)
    torch.library.opcheck(torch.ops.lra.band_attention, given)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("options", PATTERNS)
def test_dropout_leaves_pairs_out_and_keeps_the_mean(options: dict[str, Any], impl: str) -> None:
    """Rows of the batch are alike but for their masks, and v is the unit vectors, so that outputs are weights."""
    torch.manual_seed(0)
    rows, length = 2000, 12
    q, k = (torch.randn(1, length, 2, 3).expand(rows, -1, -1, -1) for _ in range(2))
    v = torch.eye(length)[None, :, None].expand(rows, -1, 2, -1)
    weights = band_attention(q[:1], k[:1], v[:1], None, **options, impl=impl)
    dropped = band_attention(q, k, v, None, dropout=0.25, **options, impl=impl)
    kept = dropped / weights.clamp_min(1e-30)
    seen = weights.expand_as(dropped) > 1e-6
    assert ((kept[seen] == 0) | ((kept[seen] - 4 / 3).abs() < 1e-3)).all()
    share = (kept > 0).float().mean(dim=0)[seen[0]]
    assert ((share - 0.75).abs() < 5 * (0.75 * 0.25 / rows) ** 0.5).all()
    # pairs of a query, and of a key, are dropped apart
    pair = kept[:, 4, 0][:, seen[0, 4, 0]] > 0
    assert len(pair.unique(dim=0)) > 2
    column = kept[:, :, 0, 4][:, seen[0, :, 0, 4]] > 0
    assert len(column.unique(dim=0)) > 2


def test_keys_beyond_the_band_are_few_large_products() -> None:
    """A Python loop of one tile for 64 queries would be most of the time of a GPU."""
    pattern = Pattern(64, 64, [1, 1, 2, 2], 1, causal=False, band=False)
    found = list(tiles(2, 8192, pattern, extra=1, budget=2**25))
    assert [(tile.batch, tile.heads, tile.queries) for tile in found] == [(slice(0, 2), slice(0, 4), slice(0, 8192))]
    small = list(tiles(2, 100, pattern, extra=3, budget=4 * 3 * 40))
    seen = torch.zeros(2, 4, 100, dtype=torch.int64)
    for tile in small:
        seen[tile.batch, tile.heads, tile.queries] += 1
    assert seen.eq(1).all()
    assert len(small) == 6
