"""Functions and modules of attention: masks, scaled dot products, multi-head, multi-query, grouped-query and
cross-attention, and the cache of keys and values.

Heads have the layout (B, H, L, d). Masks are boolean, True = attend; a mask (B, L) marks real tokens with True.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H d) -> (B, H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H d)."""
    return x.transpose(1, 2).flatten(2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Each head of keys or values for heads / G consecutive query heads: (B, G, L, d) -> (B, heads, L, d)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention_mask(
    mask: Tensor, *, causal: bool = False, window: int | None = None, block: int | None = None,
    queries: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention mask, the conjunction of the given conditions: mask: (B, L) -> (B, 1, 1 or L, L) bool, True = attend.

    padding (always): key j is real. causal: j <= i. window: |i - j| <= window (sliding window).
    block: i // block == j // block (local attention). queries: return only the rows of the last `queries` positions,
    for tokens that follow a cache. With causal, window or block, every query attends to itself, so that no row is
    empty: the softmax of a padded query without a real key in its window would be undefined.
    """
    keys = mask[:, None, None, :]
    if not causal and window is None and block is None:
        return keys
    j = torch.arange(mask.shape[1], device=mask.device)
    i = j[:, None] if queries is None else j[len(j) - queries :, None]
    allowed = torch.ones(len(i), len(j), dtype=torch.bool, device=mask.device)
    if causal:
        allowed &= i >= j
    if window is not None:
        allowed &= (i - j).abs() <= window
    if block is not None:
        allowed &= i // block == j // block
    return (keys & allowed) | (i == j)


def apply_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with -inf where `mask`, which broadcasts to their shape (B, H, Q, K), is False."""
    return scores.masked_fill(~mask, -torch.inf)


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k') v and the weights: (B, H, Q, d), (B, G, K, d), (B, G, K, e) -> (B, H, Q, e), (B, H, Q, K).

    mask: broadcasts to the weights. scale: d^-1/2 by default. G divides H. This form stores the weights and returns
    them; `fused_attention` does not. Source: arXiv:1706.03762, section 3.2.1.
    """
    k, v = (repeat_heads(t, q.shape[1]) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = (scores if mask is None else apply_mask(scores, mask)).softmax(dim=-1)
    return weights @ v, weights


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, **options: Any
) -> Tensor:
    """PyTorch's scaled_dot_product_attention. On a CPU, heads of fewer than 64 channels are computed in float32: the
    backward of the bfloat16 kernel takes twice as long there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] < 64 and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, dropout, **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, **options)


def pool_heads(tensor: Tensor, heads: int, groups: int) -> Tensor:
    """Weight or bias of `heads` heads -> that of `groups` heads, each the mean of its heads: (H d, ...) -> (G d, ...).
    Source: arXiv:2305.13245, section 2.1."""
    return tensor.unflatten(0, (groups, heads // groups, -1)).mean(dim=1).flatten(0, 1)


def cache_bytes(
    *, batch: int, tokens: int, n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> int:
    """Size of the cached keys and values of a model in bytes."""
    return 2 * batch * tokens * n_layers * n_kv_heads * head_dim * dtype.itemsize


@dataclass
class KVCache:
    """Keys and values of the tokens read so far, each (B, G, t, d); empty at first."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of C more tokens, (B, G, C, d), and return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    @property
    def tokens(self) -> int:
        """Number of tokens of one sequence."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def bytes(self) -> int:
        """Size of all keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def statistics(self) -> dict[str, float]:
        """tokens; bytes; bytes_per_token, of one sequence; key_norm and value_norm, the mean norm of a vector. Raises
        ValueError for an empty cache."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty; call the attention with it first")
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes / (len(self.keys) * self.tokens),
            "key_norm": self.keys.norm(dim=-1).mean().item(),
            "value_norm": self.values.norm(dim=-1).mean().item(),
        }


class _Attention(nn.Module):
    """Projections and heads, shared by self- and cross-attention."""

    def __init__(
        self, d_model: int, d_source: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None, dropout: float,
        bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        groups = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or (head_dim is None and d_model % n_heads):
            raise ValueError(f"n_heads is {n_heads}; a divisor of d_model, {d_model}")
        head_dim = d_model // n_heads if head_dim is None else head_dim
        if groups < 1 or n_heads % groups:
            raise ValueError(f"n_kv_heads is {groups}; a divisor of n_heads, {n_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; from 0 up to, not including, 1")
        self.n_heads, self.n_kv_heads, self.dropout = n_heads, groups, dropout
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_source, groups * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_source, groups * head_dim, bias=bias)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=bias)

    def _keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.k_proj(source), self.n_kv_heads), split_heads(self.v_proj(source), self.n_kv_heads)

    def _read(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        q, rate = split_heads(self.q_proj(x), self.n_heads), self.dropout if self.training else 0.0
        keys, values = (repeat_heads(t, self.n_heads) for t in (keys, values))
        return self.out_proj(merge_heads(fused_attention(q, keys, values, mask, rate, **options)))


class MultiHeadAttention(_Attention):
    """Self-attention: (B, L, d_model) -> (B, L, d_model).

    n_kv_heads: heads of keys and values, each shared by n_heads / n_kv_heads consecutive query heads: n_heads, the
    default, is multi-head attention (arXiv:1706.03762), 1 is multi-query (arXiv:1911.02150), a divisor between them
    grouped-query (arXiv:2305.13245). head_dim: width of a head, d_model / n_heads unless given. dropout: on the
    attention weights. bias: whether the maps have biases. Raises ValueError.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None = None, *, head_dim: int | None = None,
        dropout: float = 0.0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(d_model, d_model, n_heads, n_kv_heads, head_dim, dropout, bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False, window: int | None = None,
        block: int | None = None, cache: KVCache | None = None,
    ) -> Tensor:  # fmt: skip
        """mask: (B, L), real tokens; by default all are real. causal, window, block: as in `attention_mask`.

        cache: the tokens of x follow those in the cache and are added to it. This needs causal = True and no mask, as
        all tokens are real. Raises ValueError otherwise.
        """
        keys, values = self._keys_values(x)
        if cache is not None:
            if not causal or mask is not None:
                raise ValueError("a cache continues a sequence without padding: pass causal=True and no mask")
            keys, values = cache.append(keys, values)
        if mask is None and not causal and window is None and block is None:
            return self._read(x, keys, values, None)
        if causal and window is None and block is None and keys.shape[2] == x.shape[1]:
            # under a causal mask no real query reaches right padding
            return self._read(x, keys, values, None, is_causal=True)
        real = x.new_ones(x.shape[0], keys.shape[2], dtype=torch.bool) if mask is None else mask
        pattern = attention_mask(real, causal=causal, window=window, block=block, queries=x.shape[1])
        return self._read(x, keys, values, pattern)


@dataclass(frozen=True)
class Memory:
    """Keys and values that a CrossAttention has made of its sources, (B, G, S, d) each, and their mask (B, S)."""

    keys: Tensor
    values: Tensor
    mask: Tensor


class CrossAttention(_Attention):
    """Attention of (B, L, d_model) to one or several sources (B, S, d_source) -> (B, L, d_model).

    Several sources are read as one that joins them, each encoded by itself (Fusion-in-Decoder, arXiv:2007.01282). The
    arguments are those of MultiHeadAttention; d_source: width of the sources, d_model unless given.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None = None, *, d_source: int | None = None,
        head_dim: int | None = None, dropout: float = 0.0, bias: bool = True,
    ) -> None:  # fmt: skip
        width = d_model if d_source is None else d_source
        super().__init__(d_model, width, n_heads, n_kv_heads, head_dim, dropout, bias)

    def remember(self, sources: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor] | None = None) -> Memory:
        """Keys and values of the sources, once for many calls. sources: (B, S, d_source), or several of any S; masks:
        (B, S) for each, real tokens; all are real unless given. Each row needs a real token."""
        sources = [sources] if isinstance(sources, Tensor) else list(sources)
        if masks is None:
            masks = [source.new_ones(source.shape[:2], dtype=torch.bool) for source in sources]
        masks = [masks] if isinstance(masks, Tensor) else list(masks)
        if [t.shape[:2] for t in sources] != [m.shape for m in masks]:
            shapes = [tuple(t.shape[:2]) for t in sources], [tuple(m.shape) for m in masks]
            raise ValueError(f"sources are {shapes[0]} and their masks {shapes[1]}; one mask (B, S) for each source")
        keys, values = self._keys_values(torch.cat(sources, dim=1))
        return Memory(keys, values, torch.cat(masks, dim=1))

    def forward(
        self, x: Tensor, sources: Tensor | Sequence[Tensor] | Memory,
        masks: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """sources: as of `remember`, or what that has returned."""
        memory = sources if isinstance(sources, Memory) else self.remember(sources, masks)
        return self._read(x, memory.keys, memory.values, attention_mask(memory.mask))


A = TypeVar("A", MultiHeadAttention, CrossAttention)


def to_grouped(attention: A, n_kv_heads: int) -> A:
    """A copy with fewer heads of keys and values, each the mean of its group's: multi-head to grouped- or multi-query.
    Raises ValueError unless n_kv_heads divides the heads of keys and values."""
    heads = attention.n_kv_heads
    if n_kv_heads < 1 or heads % n_kv_heads:
        raise ValueError(f"n_kv_heads is {n_kv_heads}; a divisor of the {heads} heads of keys and values")
    grouped = copy.deepcopy(attention)
    grouped.n_kv_heads = n_kv_heads
    for proj in (grouped.k_proj, grouped.v_proj):
        proj.out_features = proj.out_features // heads * n_kv_heads
        for name, parameter in list(proj.named_parameters()):
            pooled = pool_heads(parameter.detach(), heads, n_kv_heads)
            setattr(proj, name, nn.Parameter(pooled, requires_grad=parameter.requires_grad))
    return grouped
