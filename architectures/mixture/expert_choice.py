"""Expert choice: a mixture of experts in which each expert picks the tokens that it processes.

Zhou et al. 2022, arXiv:2202.09368, section 3. x is (B, L, D); E experts of hidden width `expand` D each:

    p = softmax over the experts of x W_r + b_r            (B, L, E)
    expert e takes the floor(capacity n / E) of the n tokens of a sequence with the largest p_e
    y_t = sum over the experts that took t of p_te gelu(x_t W1_e) W2_e        (B, L, D)

`capacity` is the number of experts that a token has on average. Every expert has the same load, and there is no
balancing loss. A token that no expert takes passes by the residual connection alone. The choice looks at the whole
sequence: there is no causal form. The router is in `_moe.py`, and any stack takes it: block={"ffn": "expert_choice"}.

Initialisation: W_r normal of deviation 0.02, b_r 0, as released; experts LeCun normal, attention as `transformer`.

Departures: experts choose among the tokens of one sequence, as the released code's groups do, so that outputs do not
depend on the batch; the paper's choose among all tokens of a batch. An expert takes one token at least, and no padding
(the released code knows padding by its zeros and can still take it). Every block has experts (the paper: every second).

Checked against: tensors of the released router, its tokens, gates, outputs and every gradient; a loop over the experts
with sequences of several lengths.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class ExpertChoiceTransformer(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. capacity: experts a token has on average."""

    card = Card(
        title="Mixture-of-Experts with Expert Choice Routing",
        year=2022,
        url="https://arxiv.org/abs/2202.09368",
        scaling="L^2",
        causal=False,
        exempt={
            "exports": "an expert takes a rounded share of the length, and a graph is made for one number of tokens"
        },
    )
    refuses_causal = True

    def __init__(self, *, n_experts: int = 8, capacity: float = 2.0, **attention: Any) -> None:
        super().__init__("expert_choice", {"n_experts": n_experts, "capacity": capacity}, **attention)
