"""Mixtures of experts: feed-forward parts in which each token visits a few of many perceptrons. Any stack takes them as
`block={"ffn": "moe"}` or another name of MIXTURES, with their options under `experts`.

Of x (B, L, D), E experts and k choices a token:  y = sum over choices e of gate_e  act(x W1_e) W2_e.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._experts import Experts, TokenChoice, balance_loss
from lra.architectures._precision import wide
from lra.encoder import Cost


class NoisyTopK(TokenChoice):
    """The gate of Shazeer et al. 2017, arXiv:1701.06538, section 2.1 and appendix A, over the real tokens of a batch:

        clean = x W_g,  sd = softplus(x W_noise) + 0.01,  H = clean + normal sd when training, else clean    (T, E)
        gate = softmax of the k largest H, 0 elsewhere
        importance_e = sum of gate_e,   load_e = sum of P(expert e is among the k | noise drawn anew for e alone)
        loss = importance_weight CV(importance)^2 + load_weight CV(load)^2

    CV is standard deviation over mean. Both matrices start at 0, experts as two LeCun-normal maps. The 0.01 is that of
    the authors' released code. Without noise, load counts choices.
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, k: int = 2, capacity: float = 0.0,
        activation: str = "relu", importance_weight: float = 0.1, load_weight: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=k, capacity=capacity, activation=activation)
        self.weights = importance_weight, load_weight
        self.w_gate = nn.Parameter(torch.zeros(d_model, n_experts))
        self.w_noise = nn.Parameter(torch.zeros(d_model, n_experts))
        lecun_normal(self.w1, self.w2)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean, sd = x @ wide(self.w_gate), F.softplus(x @ wide(self.w_noise)) + 0.01
        noise = torch.randn_like(clean) if self.training else None
        index, gate, importance, load = self.gates(clean, sd, noise, mask)
        importance_weight, load_weight = self.weights
        return index, gate, importance_weight * cv_squared(importance) + load_weight * cv_squared(load)

    def gates(
        self, clean: Tensor, sd: Tensor, noise: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, L, E) each -> experts and gates (B, L, k), importance and load (E,)."""
        noisy = clean if noise is None else clean + noise * sd
        best, order = noisy.topk(min(self.k + 1, self.n_experts), dim=-1)
        index, gate = order[..., : self.k], best[..., : self.k].softmax(-1)
        real = mask.unsqueeze(-1)
        spread = torch.zeros_like(clean).scatter(-1, index, gate) * real
        chosen = torch.zeros_like(clean).scatter(-1, index, 1.0)
        if noise is None or self.k == self.n_experts:
            load = chosen
        else:
            # what e must exceed: the k-th largest of the others, which for e among the k is the (k + 1)-th of all
            threshold = torch.where(chosen > 0, best[..., self.k :], best[..., self.k - 1 : self.k])
            load = torch.special.ndtr((clean - threshold) / sd)
        return index, gate, spread.sum((0, 1)), (load * real).sum((0, 1))

    def router_cost(self, length: int) -> Cost:
        d_model, experts = self.w_gate.shape
        return Cost.linear(length, d_model, 2 * experts, bias=False)


class Switch(TokenChoice):
    """The router of Fedus et al. 2021, arXiv:2101.03961, section 2: one expert a token.

        x' = x, in training times uniform(1 - jitter, 1 + jitter)
        p = softmax(x' W_r),  expert = argmax p,  gate = max p
        balance = E sum_e f_e P_e     f_e: share of a sequence's tokens whose expert is e, P_e: mean of p_e over them
        z = mean over tokens of logsumexp(x' W_r)^2                 arXiv:2202.08906
        loss = balance_weight balance + z_weight z                  balance is the mean over the sequences of a batch

    All matrices start truncated normal of variance 0.1 / inputs (section 2.4).
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, capacity: float = 1.25, activation: str = "relu",
        jitter: float = 0.01, balance_weight: float = 0.01, z_weight: float = 0.001,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=1, capacity=capacity, activation=activation)
        self.jitter, self.weights = jitter, (balance_weight, z_weight)
        self.router = nn.Linear(d_model, n_experts, bias=False)
        for weight, inputs in ((self.router.weight, d_model), (self.w1, d_model), (self.w2, self.w2.shape[1])):
            std = (0.1 / inputs) ** 0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x, wide(self.router.weight))
        gate, index = logits.softmax(-1).max(-1, keepdim=True)
        balance, z = self.losses(logits, index, mask)
        balance_weight, z_weight = self.weights
        return index, gate, balance_weight * balance + z_weight * z

    def losses(self, logits: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Balance and z: (B, L, E), (B, L, 1), (B, L) -> two scalars."""
        z = (logits.logsumexp(-1).square() * mask).sum() / mask.sum()
        return balance_loss(logits.softmax(-1), index, mask), z

    def router_cost(self, length: int) -> Cost:
        return Cost.linear(length, self.router.in_features, self.n_experts, bias=False)


class TopTwo(TokenChoice):
    """The router of GShard, Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1: the best expert, and often the second.

        p = softmax(x W_r),  e1, e2 = the two largest,  g_i = p_ei / (p_e1 + p_e2 + 1e-9)
        in training the second is asked with probability min(1, 2 g_2), in evaluation always
        loss = balance_weight E sum_e f_e P_e     f_e: share of a sequence's tokens whose first choice is e

    First choices fill the capacity before second ones, those of later tokens before those of earlier ones: no causal
    form with a capacity. W_r starts LeCun normal, experts as two LeCun-normal maps.
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, capacity: float = 1.0, activation: str = "relu",
        balance_weight: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=2, capacity=capacity, activation=activation)
        self.balance_weight, self.looks_ahead = balance_weight, capacity > 0
        self.router = nn.Linear(d_model, n_experts, bias=False)
        lecun_normal(self.router.weight.T, self.w1, self.w2)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = F.linear(x, wide(self.router.weight)).softmax(-1)
        draws = torch.rand_like(p[..., 0]) if self.training else None
        index, gate = self.gates(p, draws)
        return index, gate, self.balance_weight * balance_loss(p, index[..., :1], mask)

    def gates(self, p: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        """p: (B, L, E), draws: (B, L) uniform -> experts, -1 for a second that is not asked, and gates: (B, L, 2)."""
        best, index = p.topk(2, dim=-1)
        gate = best / (best.sum(-1, keepdim=True) + 1e-9)
        if draws is None:
            return index, gate
        asked = torch.stack([torch.ones_like(draws, dtype=torch.bool), draws < 2 * gate[..., 1]], dim=-1)
        return index.masked_fill(~asked, -1), gate

    def within_capacity(self, chosen: Tensor, mask: Tensor) -> Tensor:
        return super().within_capacity(chosen.mT, mask).mT

    def router_cost(self, length: int) -> Cost:
        return Cost.linear(length, self.router.in_features, self.n_experts, bias=False)


class GumbelTopK(TokenChoice):
    """k experts drawn without replacement by the Gumbel top-k trick (Kool et al. 2019, arXiv:1903.06059), gates by the
    straight-through estimator (Jang et al. 2016, arXiv:1611.01144):

        h = x W_r + g,  g standard Gumbel in training, 0 in evaluation            (B, L, E)
        e_1 .. e_k = the k largest,  s = softmax(h / temperature)
        gate_j = 1 / k, with the gradient of s_{e_j}
        loss = balance_weight E sum_e f_e P_e     f_e: share of a sequence's choices, P_e: mean of softmax(x W_r)_e

    W_r starts LeCun normal, experts as two LeCun-normal maps.
    """

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, k: int = 2, capacity: float = 0.0,
        activation: str = "relu", temperature: float = 1.0, balance_weight: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=k, capacity=capacity, activation=activation)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; more than 0")
        self.temperature, self.balance_weight = temperature, balance_weight
        self.router = nn.Linear(d_model, n_experts, bias=False)
        lecun_normal(self.router.weight.T, self.w1, self.w2)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, wide(self.router.weight))
        noise = -torch.empty_like(logits).exponential_().log() if self.training else 0.0
        perturbed = logits + noise
        index = perturbed.topk(self.k, dim=-1).indices
        relaxed = (perturbed / self.temperature).softmax(-1).gather(-1, index)
        gate = 1 / self.k + (relaxed - relaxed.detach())
        return index, gate, self.balance_weight * balance_loss(logits.softmax(-1), index, mask)

    def router_cost(self, length: int) -> Cost:
        return Cost.linear(length, self.router.in_features, self.n_experts, bias=False)


class DeepSeekMoE(TokenChoice):
    """Fine-grained and shared experts, balanced by a bias: Dai et al. 2024, arXiv:2401.06066; Wang et al. 2024,
    arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

        s = sigmoid(x W_r),  score = s + b                     (B, L, E)
        groups of experts: the top_groups whose two best scores sum highest stay;  e_1 .. e_k = the k best scores there
        gate_j = scale s_{e_j} / (sum of the k + 1e-20)
        y = sum_j gate_j expert_{e_j}(x) + shared(x)           all of them SwiGLU; shared: n_shared experts wide
        after an optimiser step for which e got c_e choices:  b_e += bias_speed sign(mean of c - c_e)
        loss = balance_weight E sum_e f_e P_e                  P_e: mean of s_e / sum of s over a sequence

    No capacity, and nothing is dropped. All maps start normal of deviation 0.006 (section 4.2), b at 0.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 16, k: int = 3, n_shared: int = 1, groups: int = 1,
        top_groups: int = 1, scale: float = 1.0, bias_speed: float = 0.001, balance_weight: float = 0.0001,
    ) -> None:  # fmt: skip
        super().__init__(d_model, expand, n_experts=n_experts, k=k, capacity=0.0, activation="swiglu")
        if groups < 1 or n_experts % groups or not 1 <= top_groups <= groups:
            raise ValueError(
                f"groups is {groups} and top_groups {top_groups}; groups a divisor of the {n_experts} experts, and "
                "top_groups from 1 to groups"
            )
        if k > n_experts // groups * top_groups:
            raise ValueError(f"k is {k}; the {top_groups} best groups have {n_experts // groups * top_groups} experts")
        at_least(0, n_shared=n_shared)
        self.groups, self.top_groups, self.scale = groups, top_groups, scale
        self.bias_speed, self.balance_weight = bias_speed, balance_weight
        self.chosen: Tensor | None = None  # choices that fell on each expert since the last step
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts))
        hidden = n_shared * self.w2.shape[1]
        self.shared_up = nn.Linear(d_model, 2 * hidden, bias=False) if n_shared else None
        self.shared_down = nn.Linear(hidden, d_model, bias=False) if n_shared else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.006)

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = F.linear(x, wide(self.router.weight)).sigmoid()
        index = self.choose(s)
        if self.training and torch.is_grad_enabled():
            chosen = (F.one_hot(index, self.n_experts).sum(2) * mask.unsqueeze(-1)).sum((0, 1))
            self.chosen = chosen if self.chosen is None else self.chosen.to(chosen.device) + chosen
        best = s.gather(-1, index)
        gate = self.scale * best / (best.sum(-1, keepdim=True) + 1e-20)
        return index, gate, self.balance_weight * balance_loss(s / s.sum(-1, keepdim=True), index, mask)

    def choose(self, s: Tensor) -> Tensor:
        """(B, L, E) -> the experts of each token, (B, L, k)."""
        score = s.detach() + self.e_score_correction_bias
        if self.top_groups < self.groups:
            grouped = score.unflatten(-1, (self.groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            score = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return score.topk(self.k, dim=-1).indices

    @torch.no_grad()
    def after_step(self) -> None:
        if self.chosen is not None:
            counts, self.chosen = self.chosen.to(self.e_score_correction_bias), None
            self.e_score_correction_bias += self.bias_speed * (counts.mean() - counts).sign()

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        y = super().mix(x, mask)
        if self.shared_up is None or self.shared_down is None:
            return y
        gate, up = self.shared_up(x).chunk(2, dim=-1)
        return y + self.shared_down(F.silu(gate) * up)

    def router_cost(self, length: int) -> Cost:
        work = Cost.linear(length, self.router.in_features, self.n_experts, bias=False)
        if self.shared_up is None:
            return work
        d_model, width = self.shared_up.in_features, self.shared_up.out_features
        return work + Cost(3.0 * length * d_model * width, 5.0 * length * width)


class ExpertChoice(Experts):
    """Experts choose tokens: Zhou et al. 2022, arXiv:2202.09368, section 3.

        p = softmax over the experts of x W_r + b_r            (B, L, E)
        expert e takes the floor(capacity n / E) of a sequence's n tokens with the largest p_e, one at least
        y_t = sum over the experts that took t of p_te expert_e(x_t)

    capacity: experts a token has on average. Every expert does the same work, so there is no balancing loss. W_r starts
    normal of deviation 0.02, b_r at 0, experts as two LeCun-normal maps.
    """

    looks_ahead = True

    def __init__(
        self, d_model: int, expand: float, *, n_experts: int = 8, capacity: float = 2.0, activation: str = "gelu"
    ) -> None:
        super().__init__(d_model, expand, n_experts=n_experts, activation=activation)
        if not 0 < capacity <= n_experts:
            raise ValueError(f"capacity is {capacity}; more than 0 and at most the {n_experts} experts")
        self.capacity = capacity
        self.router = nn.Linear(d_model, n_experts)
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.zeros_(self.router.bias)
        lecun_normal(self.w1, self.w2)

    @property
    def idle_parameters(self) -> int:
        return round((self.n_experts - self.capacity) * self.one_expert())

    def most(self, length: int) -> int:
        """How many of `length` real tokens an expert takes."""
        # int(), min() and max() would tie a traced graph to one length
        most: int = torch.sym_min(torch.sym_max(torch.sym_int(length * self.capacity // self.n_experts), 1), length)
        return most

    def route(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> of every expert the tokens it takes, best first, (B, C, E); p of these; which of the C it does take."""
        p = F.linear(x, wide(self.router.weight), wide(self.router.bias)).softmax(-1)
        most = self.most(x.shape[1])
        gate, token = p.masked_fill(~mask.unsqueeze(-1), -1.0).topk(most, dim=1)
        room = (mask.sum(1, dtype=torch.float64) * self.capacity // self.n_experts).clamp(min=1).view(-1, 1, 1)
        return token, gate, torch.arange(most, device=x.device).view(1, -1, 1) < room

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            token, gate, takes = self.route(wide(x), mask)
        batch, length, width = x.shape
        rows = (token + length * torch.arange(batch, device=x.device).view(-1, 1, 1)).flatten()
        expert = torch.arange(self.n_experts, device=x.device).masked_fill(~takes, -1).expand_as(token)
        y = self.apply_experts(
            x.flatten(0, 1).index_select(0, rows), expert.reshape(-1, 1), gate.to(x.dtype).reshape(-1, 1)
        )
        times = torch.zeros_like(mask, dtype=torch.int64).flatten().index_add(0, rows, (expert >= 0).long().flatten())
        self.count((expert >= 0).sum((0, 1)), mask.sum() - (times > 0).sum(), mask.sum())
        return y.new_zeros(batch * length, width).index_add(0, rows, y).view(x.shape)

    def visits(self, length: int) -> float:
        return float(self.n_experts * self.most(length))

    def router_cost(self, length: int) -> Cost:
        return Cost.linear(length, self.router.in_features, self.n_experts)


class SoftMoE(Experts):
    """Slots that average tokens: Puigcerver et al. 2023, arXiv:2308.00951, algorithms 1 and 2.

        logits = scale <x / |x|, mu / |mu|>                    (B, L, E, S)   S slots of each expert, mu: (D, E, S)
        slot = sum_t softmax_t(logits) x_t                     (B, E, S, D)   over the tokens
        y_t = sum over slots of softmax_{e,s}(logits) expert_e(slot)          over all slots

    expert_e(z) = gelu(z W1_e + b1_e) W2_e + b2_e. |.| has 1e-6 added to its square. Every slot visits one expert, and
    nothing is dropped: no loss. mu starts LeCun normal, scale 1, experts Xavier uniform with zero biases.
    """

    looks_ahead, divides = True, False

    def __init__(self, d_model: int, expand: float, *, n_experts: int = 8, slots: int = 16) -> None:
        super().__init__(d_model, expand, n_experts=n_experts, activation="gelu")
        at_least(1, slots=slots)
        self.slots = slots
        self.mu = nn.Parameter(torch.randn(d_model, n_experts, slots) * d_model**-0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.b1 = nn.Parameter(torch.zeros(n_experts, 1, self.w2.shape[1]))
        self.b2 = nn.Parameter(torch.zeros(n_experts, 1, d_model))
        for weights in (self.w1, self.w2):
            for weight in weights:
                nn.init.xavier_uniform_(weight)

    @property
    def idle_parameters(self) -> int:
        return (self.n_experts - 1) * self.one_expert()

    def logits(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, E S)."""
        mu = self.mu.to(x.dtype).flatten(1)
        unit = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return unit @ (self.scale * mu * torch.rsqrt(mu.square().sum(0) + 1e-6))

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(wide(x))
            dispatch = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf).softmax(1).to(x.dtype)
            combine = logits.softmax(-1).to(x.dtype)
        slots = (dispatch.mT @ x).unflatten(1, (self.n_experts, -1)).transpose(0, 1).flatten(1, 2)
        h = torch.baddbmm(self.b1, slots, self.w1)
        y = torch.baddbmm(self.b2, F.gelu(h), self.w2)
        loads = (combine.detach() * mask.unsqueeze(-1)).sum((0, 1)).unflatten(0, (self.n_experts, -1)).sum(1)
        self.count(loads, loads.new_zeros(()), loads.sum())
        return combine @ y.unflatten(1, (x.shape[0], -1)).transpose(0, 1).flatten(1, 2)

    def visits(self, length: int) -> float:
        return float(self.n_experts * self.slots)

    def router_cost(self, length: int) -> Cost:
        d_model, slots = self.mu.shape[0], self.n_experts * self.slots
        return Cost(6.0 * length * d_model * slots, 10.0 * length * slots + 3.0 * length * d_model)


def lecun_normal(*maps: Tensor) -> None:
    """Draw each map (..., inputs, outputs) normal of variance 1 / inputs."""
    for weight in maps:
        nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation: variance over squared mean, 0 for one number."""
    return x.var(correction=0) / (x.mean().square() + 1e-10)


MIXTURES: dict[str, type[Experts]] = {
    "moe": NoisyTopK, "switch": Switch, "gshard": TopTwo, "gumbel": GumbelTopK, "deepseek_moe": DeepSeekMoE,
    "expert_choice": ExpertChoice, "soft_moe": SoftMoE,
}  # fmt: skip
