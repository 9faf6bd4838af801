"""Soft MoE: experts process slots, which are weighted averages of all tokens, so no token is dropped.

Puigcerver et al. 2023, arXiv:2308.00951, algorithms 1 and 2. x is (B, L, D); E experts of hidden width `expand` D and S
slots each, mu: (D, E, S):

    logits = scale <x / |x|, mu / |mu|>                    (B, L, E, S)
    slot_es = sum_t softmax over t of logits, x_t          (B, E, S, D)
    y_t = sum_es softmax over all slots of logits, (gelu(slot_es W1_e + b1_e) W2_e + b2_e)   (B, L, D)

A slot averages the whole sequence: there is no causal form. Without `slots` there are about as many of them as `length`
has tokens, and the experts do the work of one feed-forward part. The layer is in `_moe.py`, and any stack takes it:
block={"ffn": "soft_moe"}.

Initialisation: mu LeCun normal, scale 1, experts Xavier uniform with zero biases, as released; attention as
`transformer`.

Departures: padding takes no part in the averages. Every block has experts (the paper: the second half of them). The
released code rounds tokens and outputs to bfloat16 on their way to the experts.

Checked against: tensors of the authors' router with its dispatch, outputs and every gradient; sequences with padding
one by one.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class SoftMoE(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. slots: S of each expert, length / E rounded up unless given."""

    card = Card(
        title="From Sparse to Soft Mixtures of Experts",
        year=2023,
        url="https://arxiv.org/abs/2308.00951",
        scaling="L^2",
        causal=False,
    )
    refuses_causal = True

    def __init__(self, *, length: int, n_experts: int = 8, slots: int | None = None, **attention: Any) -> None:
        count = -(-length // max(n_experts, 1)) if slots is None else slots
        super().__init__("soft_moe", {"n_experts": n_experts, "slots": count}, length=length, **attention)
