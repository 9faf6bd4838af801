"""Switch Transformer: a mixture of experts in which a router picks one expert for every token.

Fedus et al. 2021, arXiv:2101.03961. x is (B, L, D); E experts of hidden width `expand` D each:

    p = softmax(x W_r)                                     (B, L, E)    equation 1
    e = argmax p,  y = p_e relu(x W1_e) W2_e               (B, L, D)    equation 2, with the one largest
    capacity = ceil(capacity_factor n / E)                 tokens an expert takes of a sequence of n, the first ones
    loss = 0.01 E sum_e f_e P_e + 0.001 mean logsumexp(x W_r)^2         equations 4 to 6; arXiv:2202.08906 equation 5

A token over the capacity passes by the residual connection alone. The router and its losses are in `_moe.py`, and any
stack takes them: block={"ffn": "switch"}. In training the router's input is multiplied by uniform(0.99, 1.01).

Initialisation: router and experts truncated normal of variance 0.1 / inputs (section 2.4), attention as `transformer`.

Departures: capacity and balance are counted per sequence, so that outputs do not depend on the batch, where the
released code takes groups of about 1,024 tokens of it; the capacity is rounded up, there down to 4 at least; padding is
not routed. One capacity factor, 1.25, in training and evaluation (the released code evaluates with 2). Every block has
experts (the paper: every second). How many tokens an expert takes depends on the length of the sequence: with a
capacity there is no recurrent mode.

Checked against: tensors of Hugging Face's SwitchTransformersSparseMLP and its losses, outputs and gradients; the dense
layer where there is one expert.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class SwitchTransformer(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. capacity: the capacity factor; 0: no limit."""

    card = Card(
        title="Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
        year=2021,
        url="https://arxiv.org/abs/2101.03961",
        scaling="L^2",
        causal=False,
    )
    recurrent = False

    def __init__(self, *, n_experts: int = 8, capacity: float = 1.25, **attention: Any) -> None:
        super().__init__("switch", {"n_experts": n_experts, "capacity": capacity}, **attention)
