"""What attention files share: masks from one helper, rotary and ALiBi positions, and the fused softmax path.

Heads are laid out (B, H, L, d). Masks are boolean, True = may look; `mask` is always the right-padding mask (B, L).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SPARE = 8
"""Features added to a head to carry the padding: one is used, eight keep fused kernels aligned."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H d) -> (B, H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H d)."""
    return x.transpose(1, 2).flatten(2)


def attention_mask(
    mask: Tensor, *, causal: bool = False, window: int | None = None, block: int | None = None
) -> Tensor:
    """Who may look at whom, as the conjunction of what is asked for: mask: (B, L) -> (B, 1, 1 or L, L) bool.

    padding (always): key j is real. causal: j <= i. window: |i - j| <= window (sliding window).
    block: i // block == j // block (local attention). Every query may look at itself, so that no row is empty: a
    padded query whose window holds no real key would otherwise be a softmax over nothing.
    """
    keys = mask[:, None, None, :]
    if not causal and window is None and block is None:
        return keys
    i = torch.arange(mask.shape[1], device=mask.device)
    allowed = torch.ones(len(i), len(i), dtype=torch.bool, device=mask.device)
    if causal:
        allowed &= i[:, None] >= i
    if window is not None:
        allowed &= (i[:, None] - i).abs() <= window
    if block is not None:
        allowed &= (i // block)[:, None] == i // block
    return (keys & allowed) | (i[:, None] == i)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, causal: bool = False, slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """softmax(q k' / sqrt(d) + bias) v over real keys, fused: q, k, v: (B, H, L, d), mask: (B, L) -> (B, H, L, d).

    slopes: (H,) of ALiBi. Under a causal mask no real query reaches right padding, so no padding mask is built.
    """
    if slopes is None:
        padding = None if causal else attention_mask(mask)
        return F.scaled_dot_product_attention(q, k, v, padding, dropout, is_causal=causal)
    scale, width = q.shape[-1] ** -0.5, v.shape[-1]
    if not causal:
        # the padding rides as one more feature of q and k, so that the bias has no batch dimension: B times less memory
        hidden = torch.where(mask, 0.0, -3e4).to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
        q, v = F.pad(F.pad(q, (0, 1), value=1.0), (0, SPARE - 1)), F.pad(v, (0, SPARE))
        k = F.pad(torch.cat([k, hidden], dim=-1), (0, SPARE - 1))
    bias = alibi_bias(slopes, mask.shape[1], causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias[None], dropout, scale=scale)[..., :width]


def alibi_slopes(heads: int) -> Tensor:
    """arXiv:2108.12409: 2^(-8 i / H), i = 1..H; for H not a power of two, those of the power p below, then every
    second one of the series of 2p. -> (H,) float64."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)][: heads - power]
    return torch.tensor(slopes, dtype=torch.float64)


def alibi_bias(slopes: Tensor, length: int, causal: bool) -> Tensor:
    """-slope |i - j|, and -inf ahead of the query when causal: (H,) -> (H, L, L). Symmetric distance is how the
    authors of ALiBi extend it to encoders."""
    i = torch.arange(length, device=slopes.device)
    bias = -slopes[:, None, None] * (i[:, None] - i).abs()
    return bias.masked_fill(i[:, None] < i, -torch.inf) if causal else bias


def rope(x: Tensor, start: int = 0, *, base: float = 10000.0, interleaved: bool = False) -> Tensor:
    """Rotary positions of arXiv:2104.09864: rotate feature pairs by (start + t) base^(-2j/d): (..., L, d), d even.

    Pairs are (j, j + d/2) as in GPT-NeoX and LLaMA; `interleaved`: (2j, 2j + 1) as in the paper. The two differ by a
    fixed permutation of the rows of the query and key maps.
    """
    half = x.shape[-1] // 2
    # float64 angles: float32 is off by 1e-3 rad at position 16,384
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device)[:, None] * rate
    kind = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)
