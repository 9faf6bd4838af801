"""The definition of `wkv`: a loop over time, with sums kept relative to their largest exponent."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    h0: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_t = (e^{top} num + e^{u + k_t} v_t) / (e^{top} den + e^{u + k_t}); then num and den decay by e^{-e^w}, and
    e^{k_t} v_t and e^{k_t} are added to them."""
    if h0 is None:
        num = den = torch.zeros_like(v[:, 0])
        top = torch.full_like(num, -1e38)
    else:
        num, den, top = h0.unbind(1)
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        largest = torch.maximum(top, u + k_t)
        past, now = torch.exp(top - largest), torch.exp(u + k_t - largest)
        outputs.append((past * num + now * v_t) / (past * den + now))
        decayed = top - torch.exp(w)
        top = torch.maximum(decayed, k_t)
        past, now = torch.exp(decayed - top), torch.exp(k_t - top)
        num, den = past * num + now * v_t, past * den + now
    o = torch.stack(outputs, dim=1)
    return (o, torch.stack([num, den, top], dim=1)) if return_state else o
