"""MoE: a mixture of many small experts, of which a noisy gate picks k for every token.

Shazeer et al. 2017, arXiv:1701.06538. x is (B, L, D), T its real tokens; E experts of hidden width `expand` D each:

    H = x W_g + normal softplus(x W_noise)                 (T, E)    equations 3 to 5; no noise in evaluation
    G = softmax of the k largest H, 0 elsewhere            (T, E)
    y = sum_e G_e relu(x W1_e) W2_e                        (B, L, D) equation 1
    loss = 0.1 CV(sum of G)^2 + 0.1 CV(load)^2             equations 6 to 11, section 4 and appendices A, C

The gate and its losses are in `_moe.py`, and any stack takes them: block={"ffn": "moe"}.

Initialisation: W_g and W_noise 0 (appendix A): no signal and some noise; experts LeCun normal, attention as
`transformer`.

Departures: the blocks mix tokens by softmax attention, where the paper has LSTM layers. `capacity` limits what an
expert takes of a sequence, as later mixtures do; the paper's noisy gate has no limit, and neither has the default. The
paper's k is above 1: with k = 1 (`moe/k1`) the gate is 1 and learns from the load alone.

Checked against: tensors of a mixture of the paper's equations (gates, importance, load, losses); the definition,
expert by expert; the dense layer where there is one expert.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class MoE(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. capacity: over k n / E, what an expert takes of n tokens; 0: no limit."""

    card = Card(
        title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        year=2017,
        url="https://arxiv.org/abs/1701.06538",
        scaling="L^2",
        causal=False,
        variants={"k1": {"k": 1}, "k4": {"k": 4}},
        exempt={"float16": "the choice of experts is a comparison: a rounded token between two may go to the other"},
    )

    def __init__(self, *, n_experts: int = 8, k: int = 2, capacity: float = 0.0, **attention: Any) -> None:
        super().__init__("moe", {"n_experts": n_experts, "k": k, "capacity": capacity}, **attention)
