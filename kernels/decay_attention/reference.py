"""The definition of `decay_attention`: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    chunk: int = 64,
    *,
    scale: float | None = None,
    h0: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; `chunk` has no influence."""
    batch, length, heads, width = k.shape
    scale = width**-0.5 if scale is None else scale
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, length, heads)
    if log_decay.dim() == 3:
        log_decay = log_decay.unsqueeze(-1).expand(k.shape)
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if h0 is None else h0
    outputs = []
    for q_t, k_t, v_t, decay in zip(*(x.unbind(1) for x in (q, k, v, log_decay.exp())), strict=True):
        state = decay.unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append(scale * (q_t.unsqueeze(-1) * state).sum(-2))
    o = torch.stack(outputs, dim=1)
    return (o, state) if return_state else o
