"""GShard: a mixture of experts; a token visits the best expert and, with some probability, the second best.

Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1. x is (B, L, D); E experts of hidden width `expand` D each:

    p = softmax(x W_r),  e1, e2 = the two largest          (B, L, E)
    g_i = p_ei / (p_e1 + p_e2),  y = sum_i g_i relu(x W1_ei) W2_ei            (B, L, D)
    in training the second expert is asked with probability min(1, 2 g_2)
    an expert takes ceil(2 capacity n / E) choices of a sequence of n tokens, first choices before second ones
    loss = 0.01 E sum_e f_e P_e                            f_e: share of first choices, P_e: mean of p_e

A choice over the capacity adds nothing, and the other gate stays as it is. The router is in `_moe.py`, and any stack
takes it: block={"ffn": "gshard"}.

Initialisation: router and experts LeCun normal, attention as `transformer`.

Departures: capacity and balance are counted per sequence, the paper's groups are parts of a batch; padding is not
routed. In evaluation the second expert is always asked, so that outputs are not random. The denominator of the gates
has 1e-9 added, and the loss has the factor E^2 over the paper's, as in the authors' tensor2tensor; so has its weight of
0.01. Every block has experts (the paper: every second). A first choice of a later token
comes before a second choice of an earlier one: with a capacity there is no causal form.

Checked against: tensors of a transcription of tensor2tensor's gating, with its draws and without: choices, places,
outputs, loss and every gradient; a loop that fills the capacity one choice at a time.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class GShard(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. capacity: over 2 n / E, what an expert takes of n tokens; 0: no limit."""

    card = Card(
        title="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
        year=2020,
        url="https://arxiv.org/abs/2006.16668",
        scaling="L^2",
        causal=False,
    )
    refuses_causal = True

    def __init__(self, *, n_experts: int = 8, capacity: float = 1.0, **attention: Any) -> None:
        super().__init__("gshard", {"n_experts": n_experts, "capacity": capacity}, **attention)
