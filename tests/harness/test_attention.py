"""lra.attention against PyTorch's own operators and modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.attention import (
    CrossAttention,
    KVCache,
    MultiHeadAttention,
    attention_mask,
    cache_bytes,
    merge_heads,
    repeat_heads,
    scaled_dot_product,
    split_heads,
    to_grouped,
)

B, L, D, H = 2, 9, 8, 4
MASK = torch.arange(L) < torch.tensor([[9], [6]])
PATTERNS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"window": 2}, {"block": 4}, {"causal": True, "window": 3}, {"causal": True, "block": 3},
]  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(kind: Any, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return kind(*arguments, **options).double()


def allowed(i: int, j: int, causal: bool = False, window: int = L, block: int = L) -> bool:
    return (j <= i or not causal) and abs(i - j) <= window and i // block == j // block


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_the_conjunction_of_what_is_asked_for(pattern: dict[str, Any]) -> None:
    mask = attention_mask(MASK, **pattern).expand(B, 1, L, L)[:, 0]
    for b in range(B):
        # without a pattern all queries share one row, and none is empty
        own = bool(pattern)
        expected = [
            [(bool(MASK[b, j]) and allowed(i, j, **pattern)) or (own and i == j) for j in range(L)] for i in range(L)
        ]
        assert mask[b].tolist() == expected
    if pattern:
        assert torch.equal(attention_mask(MASK, **pattern, queries=2), attention_mask(MASK, **pattern)[:, :, -2:])


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scaled_dot_product_is_pytorchs(pattern: dict[str, Any], groups: int) -> None:
    q, k, v = draw(B, H, L, 2), draw(B, groups, L, 2, seed=1), draw(B, groups, L, 3, seed=2)
    mask = attention_mask(MASK, **pattern)
    y, weights = scaled_dot_product(q, k, v, mask, scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(y, theirs)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, L, dtype=torch.float64))
    assert (weights[~mask.expand_as(weights)] == 0).all()


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_self_attention_is_pytorchs_operator_between_its_maps(pattern: dict[str, Any], groups: int) -> None:
    module, x = attention(MultiHeadAttention, D, H, groups), draw(B, L, D)
    q, k, v = (
        split_heads(proj(x), heads)
        for proj, heads in ((module.q_proj, H), (module.k_proj, groups), (module.v_proj, groups))
    )
    theirs = F.scaled_dot_product_attention(q, k, v, attention_mask(MASK, **pattern), enable_gqa=True)
    torch.testing.assert_close(module(x, MASK, **pattern)[MASK], module.out_proj(merge_heads(theirs))[MASK])


def test_multi_head_attention_is_pytorchs_module() -> None:
    module = attention(MultiHeadAttention, D, H)
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
    with torch.no_grad():
        maps = (module.q_proj, module.k_proj, module.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([proj.weight for proj in maps]))
        theirs.in_proj_bias.copy_(torch.cat([proj.bias for proj in maps]))
        theirs.out_proj.weight.copy_(module.out_proj.weight)
        theirs.out_proj.bias.copy_(module.out_proj.bias)
    x = draw(B, L, D)
    torch.testing.assert_close(module(x, MASK)[MASK], theirs(x, x, x, key_padding_mask=~MASK)[0][MASK])


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.get("causal")])
def test_a_cache_gives_the_outputs_of_the_whole_sequence(pattern: dict[str, Any]) -> None:
    module, x, cache = attention(MultiHeadAttention, D, H, 2), draw(B, L, D), KVCache()
    parts = [module(chunk, cache=cache, **pattern) for chunk in x.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), module(x, **pattern))
    shape = {"batch": B, "tokens": L, "n_layers": 1, "n_kv_heads": 2, "head_dim": D // H}
    assert cache.bytes == cache_bytes(**shape, dtype=torch.float64) == 2 * B * L * 2 * (D // H) * 8
    numbers = cache.statistics()
    assert (numbers["tokens"], numbers["bytes_per_token"]) == (L, 2 * 2 * (D // H) * 8)
    norms = split_heads(module.k_proj(x), 2).square().sum(-1).sqrt()
    assert numbers["key_norm"] == pytest.approx(norms.mean().item())


def test_cross_attention_reads_several_sources_as_one_and_remembers_them() -> None:
    module = attention(CrossAttention, D, H, 2, d_source=6)
    x, sources = draw(B, 3, D), [draw(B, 5, 6, seed=1), draw(B, 7, 6, seed=2)]
    masks = [torch.arange(5) < torch.tensor([[5], [2]]), torch.arange(7) < torch.tensor([[1], [7]])]
    q, k, v = module.q_proj(x), *(proj(torch.cat(sources, 1)) for proj in (module.k_proj, module.v_proj))
    q, k, v = split_heads(q, H), *(repeat_heads(split_heads(t, 2), H) for t in (k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, torch.cat(masks, 1)[:, None, None])
    expected = module.out_proj(merge_heads(theirs))
    torch.testing.assert_close(module(x, sources, masks), expected)
    memory = module.remember(sources, masks)
    torch.testing.assert_close(torch.cat([module(x[:, :1], memory), module(x[:, 1:], memory)], 1), expected)
    torch.testing.assert_close(module(x, sources[0]), module(x, sources[:1], [torch.ones_like(masks[0])]))


@pytest.mark.parametrize("kind", [MultiHeadAttention, CrossAttention])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_are_the_means_of_their_heads(kind: Any, bias: bool) -> None:
    module = attention(kind, D, H, bias=bias)
    grouped, x = to_grouped(module, 2), draw(B, L, D)
    kept, pooled = split_heads(module.k_proj(x), H), split_heads(grouped.k_proj(x), 2)
    torch.testing.assert_close(pooled, kept.unflatten(1, (2, 2)).mean(2))
    assert (grouped.k_proj.out_features, module.k_proj.out_features, module.n_kv_heads) == (D // 2, D, H)
    with torch.no_grad():
        # heads that are alike lose nothing
        for proj in (module.k_proj, module.v_proj):
            for parameter in proj.parameters():
                parameter.copy_(parameter[: D // H].repeat(H, *[1] * (parameter.ndim - 1)))
    given = (x, x) if kind is CrossAttention else (x,)
    torch.testing.assert_close(to_grouped(module, 1)(*given), module(*given))


def test_wrong_arguments_are_named() -> None:
    x = draw(B, L, D)
    for make, said in (
        (lambda: MultiHeadAttention(8, 3), "n_heads is 3; a divisor of d_model, 8"),
        (lambda: MultiHeadAttention(8, 4, 3), "n_kv_heads is 3; a divisor of n_heads, 4"),
        (lambda: MultiHeadAttention(8, 4, dropout=1.0), "dropout is 1.0"),
        (lambda: to_grouped(MultiHeadAttention(8, 4, 2), 4), "n_kv_heads is 4; a divisor of the 2 heads"),
        (lambda: attention(MultiHeadAttention, D, H)(x, cache=KVCache()), "pass causal=True and no mask"),
        (lambda: attention(CrossAttention, D, H)(x, x, MASK[:1]), "one mask (B, S) for each source"),
        (lambda: KVCache().statistics(), "the cache is empty"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is compared below)
            make()
        assert said in str(error.value)
