"""gumbel against the probabilities of ordered draws, and the gradient of the relaxed gates written out."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_near, everything
from refusals import refuses
from torch.nn import functional as F

from lra.architectures._moe import GumbelTopK
from lra.architectures.mixture.gumbel import GumbelMoE


def test_experts_are_drawn_without_replacement() -> None:
    """P(i, then j) = p_i p_j / (1 - p_i), for each of the 12 ordered pairs."""
    torch.manual_seed(0)
    experts, draws = GumbelTopK(4, 1.0, n_experts=4, k=2).train(), 40_000
    experts.router.weight.data = torch.diag(torch.tensor([1.0, 0.5, 0.0, -1.0]))
    x = torch.ones(1, draws, 4)
    index = experts.route(x, everything(x))[0][0]
    p = torch.tensor([1.0, 0.5, 0.0, -1.0]).softmax(0)
    for i in range(4):
        for j in range(4):
            share = ((index[:, 0] == i) & (index[:, 1] == j)).double().mean().item()
            wanted = 0.0 if i == j else (p[i] * p[j] / (1 - p[i])).item()
            # four standard deviations
            assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / draws) ** 0.5 + 1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gates_learn_as_the_relaxed_ones(k: int) -> None:
    torch.manual_seed(0)
    experts = GumbelTopK(6, 1.0, n_experts=4, k=k, temperature=0.5).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y = experts(x, everything(x))
    logits = x @ experts.router.weight.T
    relaxed, best = (logits / 0.5).softmax(-1), logits.argsort(dim=-1, descending=True)[..., :k]
    outputs = torch.stack([F.relu(x @ experts.w1[e]) @ experts.w2[e] for e in range(4)], dim=2)
    chosen = outputs.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 6))
    assert_near(y, chosen.mean(2), "y")
    w = torch.randn_like(y)
    found = torch.autograd.grad((y * w).sum(), experts.router.weight)[0]
    through = (relaxed.gather(-1, best).unsqueeze(-1) * chosen.detach()).sum(2)
    assert_near(found, torch.autograd.grad((through * w).sum(), experts.router.weight)[0], "gradient of the router")


def test_noise_only_when_training() -> None:
    experts, x = GumbelTopK(8, 1.0), torch.randn(2, 50, 8)
    assert not torch.equal(experts.train().route(x, everything(x))[0], experts.route(x, everything(x))[0])
    assert torch.equal(experts.eval().route(x, everything(x))[0], experts.route(x, everything(x))[0])


test_bad_arguments = refuses(GumbelMoE, d_model=8, n_layers=1, length=8)(
    ({"temperature": 0.0}, r"temperature is 0\.0; more than 0"),
    ({"k": 9}, "n_experts is 8 and k 9; k from 1"),
)
