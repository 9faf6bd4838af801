"""Gumbel: a mixture that samples k of E experts for every token and trains the gates through the sampling.

Gumbel top-k, Kool et al. 2019, arXiv:1903.06059, section 3, with the straight-through estimator of Jang et al. 2016,
arXiv:1611.01144, section 2.2. x is (B, L, D); E experts of hidden width `expand` D each:

    h = x W_r + g,  g = -log(-log u),  u uniform           (B, L, E)    g = 0 in evaluation
    e_1 .. e_k = the k largest h: k draws without replacement from softmax(x W_r)
    s = softmax(h / temperature)
    y = sum_j gate_j relu(x W1_ej) W2_ej                   (B, L, D)    gate_j is 1 / k, its gradient that of s_ej
    loss = 0.01 E sum_e f_e P_e                            f_e: share of choices, P_e: mean of softmax(x W_r)_e

Only the experts of a token are computed, so that the gradient of s reaches the router through these k alone. The router
is in `_moe.py`, and any stack takes it: block={"ffn": "gumbel"}.

Initialisation: router and experts LeCun normal, attention as `transformer`.

Departures: neither paper has experts; the balance loss is that of `switch`, counted per sequence.

Checked against: the probabilities of ordered draws in closed form; the gradient of the relaxed gates, written out.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class GumbelMoE(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. temperature: of the relaxed gates."""

    card = Card(
        title="Categorical Reparameterization with Gumbel-Softmax",
        year=2016,
        url="https://arxiv.org/abs/1611.01144",
        scaling="L^2",
        causal=False,
    )

    def __init__(self, *, n_experts: int = 8, k: int = 2, temperature: float = 1.0, **attention: Any) -> None:
        super().__init__("gumbel", {"n_experts": n_experts, "k": k, "temperature": temperature}, **attention)
