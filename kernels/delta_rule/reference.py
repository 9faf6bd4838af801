"""The definition of `delta_rule`: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    chunk: int = 64,
    *,
    scale: float | None = None,
    h0: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """S' = exp(log_decay_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale S_t^T q_t; `chunk` has no
    influence."""
    batch, _, heads, width = k.shape
    scale = width**-0.5 if scale is None else scale
    decay = torch.ones_like(beta) if log_decay is None else log_decay.exp()
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if h0 is None else h0
    outputs = []
    for q_t, k_t, v_t, beta_t, decay_t in zip(*(x.unbind(1) for x in (q, k, v, beta, decay)), strict=True):
        state = decay_t[..., None, None] * state
        error = v_t - (state * k_t.unsqueeze(-1)).sum(-2)
        state = state + k_t.unsqueeze(-1) * (beta_t.unsqueeze(-1) * error).unsqueeze(-2)
        outputs.append(scale * (state * q_t.unsqueeze(-1)).sum(-2))
    o = torch.stack(outputs, dim=1)
    return (o, state) if return_state else o
