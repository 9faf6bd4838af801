"""MesaNet: a layer that, at every token, applies the least-squares fit to all keys and values so far.

von Oswald et al. 2025, arXiv:2506.05233. With H heads of width K:

    q, k = silu(conv(x W_q, x W_k)),   v = x W_v           (B, L, H, K) each    conv: depthwise, causal
    q, k = q / |q|, k / |k|
    beta = sigmoid(x W_b + b_b),   gamma = sigmoid(x W_a + b_a)     (B, L, H)
    G_t = gamma_t G_{t-1} + beta_t k_t k_t^T,   S_t = gamma_t S_{t-1} + beta_t k_t v_t^T,   G_0 = S_0 = 0
    o_t = S_t^T (G_t + diag(lambda))^{-1} q_t              (B, L, H, K)
    lambda = softplus(lambda_params) + 0.25                (H, K)
    out = norm(o) W_o                                      (B, L, D)      RMS over the K features of a head, one gain

o_t is W q_t for the W that minimises 1/2 sum_{i<=t} zeta_ti |v_i - W k_i|^2 + 1/2 tr(W diag(lambda) W^T), where
zeta_ti is beta_i times the gammas after i. The system is solved by conjugate gradients, all tokens at once: G_t p_t for
all t is one linear attention with decay, so that no G is stored. Gradients are those of the solution (implicit
differentiation): another solve, with the same matrix, and no step of the first one is kept. Each of the 30 steps reads
all vectors from memory: an operator would keep those of a head in the cache over all steps.

Initialisation: maps and taps are PyTorch's own; lambda = 1, which learns without weight decay.

Departures: none known in the mixer. 30 steps of conjugate gradients, as released; in exact arithmetic K of them are
enough. The released kernel adds 1e-5 to two denominators, which is left out. Four heads by default, of width D / H. A
block has a SwiGLU part of width 8/3 D, with biases, and RMS norm.

Checked against: tensors of flash-linear-attention's exact solution, with every gradient; the layer token by token with
the matrices inverted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._delta import unit
from lra.architectures._norm import RMSNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

State = tuple[Tensor, Tensor, Tensor, Tensor]
CHUNK = 64
LOWEST = 0.25
"""Of lambda."""


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, steps: int) -> Tensor:
    """x with product(x) = right, a symmetric positive definite map of the last dimension, from x = 0."""
    tiny = torch.finfo(right.dtype).tiny
    x, residual = torch.zeros_like(right), right
    direction, norm = residual, residual.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = product(direction)
        # a residual that is exactly 0 leaves x where it is
        length = norm / (direction * image).sum(-1, keepdim=True).clamp_min(tiny)
        x, residual = x + length * direction, residual - length * image
        before, norm = norm, residual.square().sum(-1, keepdim=True)
        direction = residual + norm / before.clamp_min(tiny) * direction
    return x


def gram(p: Tensor, k: Tensor, weighted: Tensor, log_gamma: Tensor, ridge: Tensor) -> Tensor:
    """(G_t + diag(lambda)) p_t for every t: p, k, weighted = beta k: (B, L, H, K); log_gamma: (B, L, H); ridge: lambda,
    (H, K)."""
    o = decay_attention(p, k, weighted, log_gamma, CHUNK, scale=1.0)
    assert isinstance(o, Tensor)
    return o + ridge * p


class Solution(torch.autograd.Function):
    """x, as a function of the residual r = q - A x of a symmetric A: its derivative is the inverse of A."""

    # torch.compile passes arguments one place late to a forward that takes any number of them
    @staticmethod
    def forward(
        residual: Tensor, x: Tensor, steps: int, k: Tensor, weighted: Tensor, log_gamma: Tensor, ridge: Tensor
    ) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.steps, *matrix = inputs
        ctx.save_for_backward(*matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, weighted, log_gamma, ridge = ctx.saved_tensors
        solved = conjugate_gradients(lambda p: gram(p, k, weighted, log_gamma, ridge), grad, ctx.steps)
        return solved, *[None] * 6


def mesa(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_gamma: Tensor, ridge: Tensor, steps: int) -> Tensor:
    """o of the equations: q, k, v: (B, L, H, K); beta, log_gamma: (B, L, H); ridge: lambda, (H, K)."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta = wide(q), wide(k), wide(v), wide(beta).unsqueeze(-1)
        weighted = beta * k
        with torch.no_grad():
            x = conjugate_gradients(lambda p: gram(p, k, weighted, log_gamma, ridge), q, steps)
        residual = q - gram(x, k, weighted, log_gamma, ridge)
        solved = Solution.apply(residual, x, steps, *(t.detach() for t in (k, weighted, log_gamma, ridge)))
        o = decay_attention(solved, k, beta * v, log_gamma, CHUNK, scale=1.0)
        assert isinstance(o, Tensor)
        return o


class MesaMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, n_heads: int, *, head_dim: int, d_conv: int, steps: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.steps = n_heads, head_dim, steps
        width = n_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, width, bias=False) for _ in range(3))
        self.a_proj, self.b_proj = nn.Linear(d_model, n_heads), nn.Linear(d_model, n_heads)
        self.lambda_params = nn.Parameter(torch.full((width,), math.log(math.expm1(1 - LOWEST))))
        self.q_conv1d, self.k_conv1d = ShortConvolution(width, d_conv), ShortConvolution(width, d_conv)
        self.o_norm = RMSNorm(head_dim, eps=1e-5)
        self.o_proj = nn.Linear(width, d_model, bias=False)

    def _views(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Convolved q, k: (..., H K) -> the arguments of `mesa` but for the steps."""
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, self.v_proj(x)))
        beta, log_gamma = torch.sigmoid(wide(self.b_proj(x))), F.logsigmoid(wide(self.a_proj(x)))
        ridge = (F.softplus(wide(self.lambda_params)) + LOWEST).unflatten(0, (self.n_heads, -1))
        return unit(q), unit(k), v, beta, log_gamma, ridge

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        views = self._views(x, self.q_conv1d(self.q_proj(x)), self.k_conv1d(self.k_proj(x)))
        return self.o_proj(self.o_norm(mesa(*views, self.steps)).flatten(-2))

    def cost(self, length: int) -> Cost:
        d_model, width = self.q_proj.in_features, self.q_proj.out_features
        maps = 4 * Cost.linear(length, d_model, width, False) + 2 * Cost.linear(length, d_model, self.n_heads)
        attention = 4.0 * CHUNK * width + 4.0 * width * self.head_dim
        solve = (self.steps + 2) * (attention + 14.0 * width)
        return maps + self.q_conv1d.cost(length) + self.k_conv1d.cost(length) + Cost(other=length * solve)

    def init_state(self, batch: int) -> State:
        windows = self.q_conv1d.init_state(batch), self.k_conv1d.init_state(batch)
        zeros = wide(self.lambda_params.new_zeros(batch, self.n_heads, self.head_dim, self.head_dim))
        return *windows, zeros, zeros.clone()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of both convolutions, G and S (B, H, K, K)."""
        q, q_window = self.q_conv1d.step(self.q_proj(x), state[0])
        k, k_window = self.k_conv1d.step(self.k_proj(x), state[1])
        q, k, v, beta, log_gamma, ridge = self._views(x, q, k)
        kept, weighted = log_gamma.exp()[..., None, None], (beta.unsqueeze(-1) * k).unsqueeze(-1)
        G, S = kept * state[2] + weighted * k.unsqueeze(-2), kept * state[3] + weighted * v.unsqueeze(-2)
        solved = conjugate_gradients(lambda p: torch.einsum("bhij,bhj->bhi", G, p) + ridge * p, wide(q), self.steps)
        o = torch.einsum("bhkv,bhk->bhv", S, solved)
        return self.o_proj(self.o_norm(o).flatten(-2)), (q_window, k_window, G, S)


class Mesa(Stack):
    """n_heads: H. head_dim: K, d_model / n_heads unless given. d_conv: taps of the convolutions. steps: of conjugate
    gradients, forward and backward."""

    card = Card(
        title="MesaNet: Sequence Modeling by Locally Optimal Test-Time Training",
        year=2025,
        url="https://arxiv.org/abs/2506.05233",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int = 4,
        head_dim: int | None = None,
        d_conv: int = 4,
        steps: int = 30,
        **stack: Any,
    ) -> None:
        at_least(1, n_heads=n_heads, head_dim=head_dim, d_conv=d_conv, steps=steps)
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}; a divisor of d_model, {d_model}, unless head_dim is given")
        width = d_model // n_heads if head_dim is None else head_dim
        super().__init__(
            lambda _: MesaMixer(d_model, n_heads, head_dim=width, d_conv=d_conv, steps=steps), d_model=d_model, **stack
        )

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "lambda_params")
