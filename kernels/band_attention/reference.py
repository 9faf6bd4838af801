"""Definition of band_attention: a dense L x L mask and a softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def allowed(
    mask: Tensor | None,
    batch: int,
    length: int,
    window: tuple[int, int],
    dilation: Sequence[int],
    n_global: int,
    random_blocks: Tensor | None,
    global_mask: Tensor | None,
    block: int,
    causal: bool,
    mutual: bool,
    device: torch.device,
) -> Tensor:
    """Which key each query sees: (B, H, L, L) bool."""
    position = torch.arange(length, device=device)
    d = position // block - (position // block).unsqueeze(1)
    step = torch.tensor(dilation, device=device).view(-1, 1, 1)
    sees = (d % step == 0) & (d >= -window[0] * step) & (d <= window[1] * step)
    if random_blocks is not None:
        chosen = random_blocks[:, position // block].unsqueeze(-2) == (position // block).view(-1, 1)
        sees = sees | chosen.any(-1)
    is_global = (position < n_global).expand(batch, length)
    if global_mask is not None:
        is_global = is_global | global_mask
    sees = sees | is_global[:, None, None, :]
    if mutual:
        sees = sees | is_global[:, None, :, None]
    if causal:
        sees = sees & (position <= position.unsqueeze(1))
    return sees if mask is None else sees & mask[:, None, None, :]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    window: int | tuple[int, int],
    dilation: int | Sequence[int] = 1,
    n_global: int = 0,
    random_blocks: Tensor | None = None,
    *,
    global_mask: Tensor | None = None,
    block: int = 1,
    causal: bool = False,
    mutual: bool = True,
    slopes: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Arguments of `band_attention`."""
    batch, length, heads, size = q.shape
    window = (window, window) if isinstance(window, int) else window
    steps = [dilation] * heads if isinstance(dilation, int) else dilation
    globals_, ways = (n_global, random_blocks, global_mask), (block, causal, mutual)
    sees = allowed(mask, batch, length, window, steps, *globals_, *ways, q.device)
    scores = torch.einsum("bihe,bjhe->bhij", q, k.to(q.dtype)) * (size**-0.5 if scale is None else scale)
    if slopes is not None:
        position = torch.arange(length, device=q.device)
        scores = scores - slopes.to(scores.dtype)[:, None, None] * (position - position[:, None]).abs()
    # a row without keys stays out of the softmax, whose gradient would be nan there
    nothing = ~sees.any(-1, keepdim=True)
    weights = scores.masked_fill(~sees & ~nothing, -torch.inf).softmax(-1).masked_fill(nothing, 0)
    return torch.einsum("bhij,bjhe->bihe", F.dropout(weights, dropout), v.to(q.dtype))
