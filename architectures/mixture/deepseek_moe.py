"""DeepSeekMoE: many small experts beside shared ones, balanced mainly by a bias on their scores and not by a loss.

Dai et al. 2024, arXiv:2401.06066; balancing by Wang et al. 2024, arXiv:2408.15664; router of DeepSeek-V3,
arXiv:2412.19437, section 2.1.2. x is (B, L, D); E experts of hidden width F = `expand` D, and n_shared more for all:

    s = sigmoid(x W_r)                                     (B, L, E)
    e_1 .. e_k = the k largest s + b, in the top_groups of `groups` groups whose two best sum highest
    gate_j = scale s_ej / sum of the k                     b chooses and weighs nothing
    y = sum_j gate_j expert_ej(x) + shared(x)              (B, L, D)    expert(x) = (silu(x W1) * x W3) W2
    b_e += 0.001 sign(mean of c - c_e)                     after each step; c_e: choices that fell on e
    loss = 0.0001 E sum_e f_e P_e                          f_e: share of choices of a sequence, P_e: mean of s_e / sum s

No capacity: nothing is dropped. The router is in `_moe.py`, and any stack takes it: block={"ffn": "deepseek_moe"}.

Initialisation: all maps of the mixture normal of deviation 0.006 (V3, section 4.2), b 0, attention as `transformer`.

Departures: a training loop of one's own moves b by calling `after_step` of the encoder; the suite's does. Limits on
devices are left out. Every block has experts (the papers: all but the first). Latent attention is an architecture of
its own.

Checked against: tensors of Hugging Face's DeepseekV3MoE with groups and a shared expert: choices, gates, outputs, every
gradient; of the papers' balance loss and bias update; a loop over the tokens.
"""

from __future__ import annotations

from typing import Any

from lra.architectures._mixture import MixtureStack
from lra.encoder import Card


class DeepSeekMoETransformer(MixtureStack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. n_experts: E, each with
    the hidden width block.expand says. n_shared: experts that every token visits. groups, top_groups: of experts, and
    how many groups a token may visit. scale: of the gates."""

    card = Card(
        title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        year=2024,
        url="https://arxiv.org/abs/2401.06066",
        scaling="L^2",
        causal=False,
    )

    def __init__(
        self,
        *,
        n_experts: int = 16,
        k: int = 3,
        n_shared: int = 1,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        **attention: Any,
    ) -> None:
        experts = {
            "n_experts": n_experts, "k": k, "n_shared": n_shared, "groups": groups, "top_groups": top_groups,
            "scale": scale,
        }  # fmt: skip
        super().__init__("deepseek_moe", experts, **attention)
