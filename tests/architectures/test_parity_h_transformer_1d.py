"""h_transformer_1d against its definition, pair by pair, which with three changes gives other code's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_same_gradients, golden
from torch import Tensor

from lra.architectures.attention.h_transformer_1d import HMixer, HTransformer1D
from lra.attention import merge_heads, split_heads
from lra.conformance.suite import check


def group(t: Tensor, i: int, level: int) -> Tensor:
    """Mean of the halves of the coarse token of i, without a half past the end: (n, d) -> (d,)."""
    if level == 0:
        return t[i]
    first = i >> level << level
    starts = [start for start in (first, first + (1 << (level - 1))) if start < len(t)]
    return torch.stack([group(t, start, level - 1) for start in starts]).mean(0)


def definition(q: Tensor, k: Tensor, v: Tensor, size: int, causal: bool) -> Tensor:
    """One head of one sequence without padding: (n, d) -> (n, d)."""
    rows = []
    for i in range(len(q)):
        scores = []
        for j in range(i + 1 if causal else len(q)):
            level = next(n for n in range(30) if abs((i >> n) // size - (j >> n) // size) <= 1)
            query = q[i >> level << level] if causal else group(q, i, level)
            scores.append(query @ group(k, j, level) / q.shape[-1] ** 0.5)
        rows.append(torch.stack(scores).softmax(0) @ v[: len(scores)])
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "lengths"), [(2, (13, 9)), (4, (14, 21)), (2, (1, 3)), (8, (11, 6))])
def test_equals_its_definition(size: int, lengths: tuple[int, int], causal: bool) -> None:
    torch.manual_seed(0)
    mixer = HMixer(8, 2, width=8, causal=causal, size=size, dropout=0.0).double()
    x, longest = torch.randn(2, max(lengths), 8, dtype=torch.float64), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def expected(x: Tensor) -> Tensor:
        q, k, v = mixer.heads(3 * x)
        y = torch.zeros_like(q)
        for row, length in enumerate(lengths):
            for h in range(2):
                own = q[row, h, :length], k[row, h, :length], v[row, h, :length]
                y[row, h, :length] = definition(*own, size, causal)
        return mixer.out(merge_heads(y)) * mask[..., None]

    def found(x: Tensor) -> Tensor:
        return mixer(3 * x, mask) * mask[..., None]

    assert_same_gradients(mixer, x, found, expected, 1e-11)


def test_definition_with_three_changes_gives_the_tensors_of_another_implementation() -> None:
    """Siblings in place of neighbours, so that halves never meet; a maximum for each level; coarse keys count once. The
    layer has none of these, so its own forward cannot give these tensors; it is compared with its definition above."""
    g = golden("h_transformer_1d")
    length, size, heads = (int(g[f"cfg.{n}"]) for n in ("L", "block", "H"))
    total = 1 << (length - 1).bit_length()
    given = g["x"].requires_grad_()
    x = torch.nn.functional.pad(given, (0, 0, 0, total - length))
    q, k, v = (split_heads(t, heads) for t in (x @ g["param.to_qkv.weight"].T).chunk(3, -1))
    y, norm = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    # level, and by how many blocks the keys are apart: own and sibling of single tokens, siblings of coarse ones
    for level, apart in ((0, 0), *((n, 1) for n in range((total // size).bit_length() - 2))):
        for i in range(total):
            block = ((i >> level) // size) ^ apart
            keys = [(block * size + n) << level for n in range(size)]
            scores = torch.stack(
                [(mean(q, i, level) * mean(k, j, level)).sum(-1) / q.shape[-1] ** 0.5 for j in keys], -1
            )
            a = (scores - scores.amax(-1, keepdim=True)).exp()
            sums = torch.stack([mean(v, j, level) * (1 << level) for j in keys], -2)
            y[:, :, i] += (a.unsqueeze(-1) * sums).sum(-2)
            norm[:, :, i] += a.sum(-1, keepdim=True)
    out = merge_heads(y / (norm + 1e-8)) @ g["param.to_out.weight"].T + g["param.to_out.bias"]
    assert_close(out[:, :length], g["y"], 1e-12)
    assert_close(torch.autograd.grad(out[:, :length], given, g["w"])[0], g["grad.x"], 1e-12)


def mean(t: Tensor, i: int, level: int) -> Tensor:
    """Over the tokens in the same coarse token as i, for all heads: (B, H, n, d) -> (B, H, d)."""
    start = i >> level << level
    return t[:, :, start : start + (1 << level)].mean(2)


def test_several_levels_conform() -> None:
    names = [
        "padding",
        "padding_length",
        "padding_nan",
        "padding_row",
        "causal",
        "step",
        "cost",
        "precision",
        "float16",
    ]
    findings = check("h_transformer_1d", names, {"size": 2})
    findings += check("h_transformer_1d", ["step"], {"size": 2, "direction": "causal"})
    assert not [f"{f.check}: {f.message}" for f in findings if f.failed]


@pytest.mark.parametrize("size", [0, 3])
def test_wrong_arguments_are_named(size: int) -> None:
    wrong: dict[str, Any] = {"size": size}
    with pytest.raises(ValueError, match=f"size is {size}; an even number"):
        HTransformer1D(d_model=16, n_layers=1, length=8, **wrong)
