"""TTT-Linear: a recurrence whose state is a linear model, trained by gradient descent on the tokens it reads.

Sun et al. 2024, arXiv:2407.04620. With H heads of width F = D / H and mini-batches of m tokens, i = 1 .. m in each:

    q, k, v = W_q x, W_k x, W_v x                          (B, L, H, F) each    q, k: rotary positions i - 1
    f(u; W, b) = norm(u W + b)                             layer norm with gains and biases of each head
    lr = sigmoid(w_lr . x + b_lr) / F                      (B, L, H)
    eta_i = max(0, 1 / i + token_i)                        (m,)
    grad_j = derivative of 1/2 |f(k_j; W, b) - (v_j - k_j)|^2 in u W + b, at the W and b a mini-batch starts with
    W_i = W - eta_i sum_{j<=i} lr_j k_j grad_j^T,   b_i = b - eta_i sum_{j<=i} lr_j grad_j
    o_i = q_i + f(q_i; W_i, b_i);   the next mini-batch starts with W_m, b_m
    out = W_o norm(o)                                      (B, L, D)      layer norm over all D features

A mini-batch is computed at once in the dual form, without any W_i but the last; the inner model's nonlinearity lets no
other order run in parallel, so that there is a loop over L / m mini-batches.

Initialisation, that of the released code: W normal with a deviation of 0.02, b = 0; w_lr normal with 0.02, b_lr = 0;
token = 0. Maps are PyTorch's own.

Departures: none known in the mixer, in the form for the Transformer's block, without gate and convolution. As released,
the sum of gradients is divided by i, where the paper adds them. Four heads and m = 16 by default. A block has a SwiGLU
part of width 8/3 D, with biases, and RMS norm.

Checked against: tensors of the authors' TTTLinear, whose last mini-batch is shorter: outputs, reads ahead of the outer
norm, every gradient; gradient descent written out with PyTorch's own derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import rope
from lra.architectures._checks import at_least
from lra.architectures._norm import LayerNorm
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
EPS = 1e-6


class TTTLinearMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, n_heads: int, mini_batch: int) -> None:
        super().__init__()
        self.n_heads, self.mini_batch, self.head = n_heads, mini_batch, d_model // n_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(n_heads, 1, d_model).normal_(std=0.02))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(n_heads, 1))
        self.learnable_token_idx = nn.Parameter(torch.zeros(mini_batch))
        self.W1 = nn.Parameter(torch.empty(n_heads, self.head, self.head).normal_(std=0.02))
        self.b1 = nn.Parameter(torch.zeros(n_heads, 1, self.head))
        self.ttt_norm_weight = nn.Parameter(torch.ones(n_heads, self.head))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(n_heads, self.head))
        self.post_norm = LayerNorm(d_model, eps=EPS)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def _views(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(..., D) -> q, k, v: (..., H, F), ahead of their positions, and lr: (..., H, 1)."""
        q, k, v = (wide(p(x)).unflatten(-1, (self.n_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        rate = F.linear(x, self.learnable_ttt_lr_weight.squeeze(1), self.learnable_ttt_lr_bias.squeeze(1))
        return q, k, v, torch.sigmoid(wide(rate)).unsqueeze(-1) / self.head

    def _eta(self) -> Tensor:
        """(m,)."""
        index = torch.arange(1, self.mini_batch + 1, device=self.W1.device)
        return (1 / index.to(wide(self.W1).dtype) + self.learnable_token_idx).clamp_min(0)

    def _model(self, z: Tensor) -> Tensor:
        """The inner norm: (B, H, m, F)."""
        return F.layer_norm(z, z.shape[-1:], eps=EPS) * self.ttt_norm_weight[:, None] + self.ttt_norm_bias[:, None]

    def _gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Derivative of 1/2 |norm(z) - target|^2 in z: (B, H, m, F)."""
        centred = z - z.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
        normed, gain = centred * scale, self.ttt_norm_weight[:, None]
        error = (gain * normed + self.ttt_norm_bias[:, None] - target) * gain
        along = normed * (error * normed).mean(-1, keepdim=True)
        return (error - error.mean(-1, keepdim=True) - along) * scale

    def _finish(self, o: Tensor) -> Tensor:
        """(..., H, F) -> (..., D)."""
        return self.o_proj(self.post_norm(o.flatten(-2)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        size, length = self.mini_batch, x.shape[1]

        def cut(t: Tensor) -> Tensor:
            t = F.pad(t, (0, 0, 0, 0, 0, -length % size))
            return t.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)  # (B, H, n, m, ...)

        q, k, v, rate = (cut(t) for t in self._views(x))
        with torch.autocast(x.device.type, enabled=False):
            q, k = (rope(t, interleaved=True) for t in (q, k))
            ones, eta = torch.ones(size, size, dtype=q.dtype, device=q.device).tril(), self._eta().unsqueeze(-1)
            rates = eta * ones * rate.mT  # (m, m): what gradient j weighs in W_i
            scores, target = rates * (q @ k.mT), v - k
            W, b = (wide(part).expand(x.shape[0], -1, -1, -1) for part in (self.W1, self.b1))
            outputs = []
            for n in range(q.shape[2]):
                grad = self._gradient(k[:, :, n] @ W + b, target[:, :, n])
                z = q[:, :, n] @ W - scores[:, :, n] @ grad + b - rates[:, :, n] @ grad
                outputs.append(q[:, :, n] + self._model(z))
                step = eta[-1] * rate[:, :, n] * grad
                W, b = W - k[:, :, n].mT @ step, b - step.sum(2, keepdim=True)
            o = torch.cat(outputs, 2).transpose(1, 2)[:, :length]
        return self._finish(o)

    def cost(self, length: int) -> Cost:
        d_model, head, size = self.q_proj.in_features, self.head, self.mini_batch
        maps = 4 * Cost.linear(length, d_model, d_model, False) + Cost.linear(length, d_model, self.n_heads)
        batches = -(-length // size) * self.n_heads
        products = 6.0 * size * head * (head + size)
        return maps + Cost(batches * products, batches * size * (6.0 * size + 60.0 * head))

    def init_state(self, batch: int) -> State:
        W, b = (wide(t).expand(batch, -1, -1, -1) for t in (self.W1, self.b1))
        return torch.zeros((), dtype=torch.int64, device=W.device), W, b, torch.zeros_like(W), torch.zeros_like(b)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the place in the mini-batch, W (B, H, F, F) and b (B, H, 1, F) that it starts with, and the sums of
        their gradients so far."""
        place, W, b, of_W, of_b = state
        i = int(place)
        q, k, v, rate = (t.unsqueeze(-2) for t in self._views(x))
        q, k = (rope(t, i, interleaved=True) for t in (q, k))
        step = rate * self._gradient(k @ W + b, v - k)
        of_W, of_b, eta = of_W + k.mT @ step, of_b + step, self._eta()[i]
        now_W, now_b = W - eta * of_W, b - eta * of_b
        y = self._finish((q + self._model(q @ now_W + now_b)).squeeze(-2))
        if i + 1 == self.mini_batch:
            return y, (torch.zeros_like(place), now_W, now_b, torch.zeros_like(of_W), torch.zeros_like(of_b))
        return y, (place + 1, W, b, of_W, of_b)


class TTTLinear(Stack):
    """n_heads: H; d_model / H must be even. mini_batch: m, tokens between two states of the inner model."""

    card = Card(
        title="Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
        year=2024,
        url="https://arxiv.org/abs/2407.04620",
        scaling="L",
        causal=True,
        exempt={
            "exports": "the mini-batches follow the length",
        },
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(self, *, d_model: int, n_heads: int = 4, mini_batch: int = 16, **stack: Any) -> None:
        at_least(1, n_heads=n_heads, mini_batch=mini_batch)
        if d_model % (2 * n_heads):
            raise ValueError(f"n_heads is {n_heads}; d_model, {d_model}, splits into heads of an even width")
        super().__init__(lambda _: TTTLinearMixer(d_model, n_heads, mini_batch), d_model=d_model, **stack)
