"""Titans, neural memory: a perceptron that is trained on the sequence it reads, with momentum and forgetting.

Behrouz, Zhong and Mirrokni 2025, arXiv:2501.00663, sections 3.1 and 3.2. With chunks of C tokens and norms RMS:

    q = W_q norm_r(x);  k, v = W_k s, W_v s;  lr = max_lr sigmoid(w_lr s + b_lr),  s = norm_s(x)     (B, L, D); (B, L)
    m, d = sigmoid of a map of the mean of s over a chunk  (B,) each   momentum and forgetting
    M(z) = (1 + g) norm(gelu(z W) V) + z                   (B, L, D)   layer norm; g: (D), W: (D, F), V: (F, D)
    G = derivative of sum_i lr_i mean((M(k_i) - v_i)^2) over a chunk, in g, W and V of the memory at its start
    S = m S - G                                                        surprise
    (g, W, V) = (1 - d) (g, W, V) + S                                  the memory after the chunk
    y_t = M(q_t)                                           (B, L, D)   of the memory after all complete chunks, also
                                                                       that of t where t is its last token

Chunks are worked on one after the other, the tokens of one at once.

Initialisation: W and V Xavier uniform, g = 0, other maps as torch.nn.Linear, but b_d = -3, so that a chunk forgets 5 %
of the memory at first, its start included. max_lr = 0.1 is ours: with 1, the
outputs of a fourth layer are 35 times those of the first.

Departures: the memory module alone (LMM), in a residual block with a feed-forward part; the attention of MAC, MAG and
MAL, persistent tokens and convolutions are left out. The paper leaves gates, loss and norm of the memory open; they are
those of the code compared with, whose loss is a mean over D. `frozen` takes all derivatives at the memory a sequence
starts with, as that code does by default.

Checked against: tensors of the package titans-pytorch, frozen: outputs, every gradient; training of the memory with
PyTorch's own derivatives, in both forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._norm import RMSNorm
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer

EPS = 1e-5
RMS_EPS = torch.finfo(torch.float32).eps
"""PyTorch's own for float32."""
Memory = tuple[Tensor, ...]
State = tuple[Tensor, ...]


def recall(memory: Memory, z: Tensor) -> Tensor:
    """M(z): memory g (B, 1, D), W (B, D, F), V (B, F, D); z: (B, C, D) -> (B, C, D)."""
    gain, W, V = memory
    return (1 + gain) * F.layer_norm(F.gelu(z @ W) @ V, z.shape[-1:], eps=EPS) + z


def surprise(memory: Memory, k: Tensor, v: Tensor, rate: Tensor) -> Memory:
    """G: k, v: (B, C, D), rate: (B, C, 1) -> the derivatives, shaped as the memory."""
    gain, W, V = memory
    h = k @ W
    a = F.gelu(h)
    u = a @ V
    u = u - u.mean(-1, keepdim=True)
    scale = torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)
    normed = u * scale
    error = 2 * rate * ((1 + gain) * normed + k - v) / k.shape[-1]
    back = error * (1 + gain)
    back = (back - back.mean(-1, keepdim=True) - normed * (back * normed).mean(-1, keepdim=True)) * scale
    slope = torch.special.ndtr(h) + h * torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)
    return (error * normed).sum(1, keepdim=True), k.mT @ (back @ V.mT * slope), a.mT @ back


class TitansMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, hidden: int, *, chunk: int, max_lr: float, frozen: bool) -> None:
        super().__init__()
        self.size, self.max_lr, self.frozen = chunk, max_lr, frozen
        self.retrieve_norm, self.store_norm = RMSNorm(d_model, RMS_EPS), RMSNorm(d_model, RMS_EPS)
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.to_adaptive_step, self.to_momentum, self.to_decay_factor = (nn.Linear(d_model, 1) for _ in range(3))
        self.gain = nn.Parameter(torch.zeros(1, d_model))
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_model, hidden)))
        self.V = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden, d_model)))
        nn.init.constant_(self.to_decay_factor.bias, -3.0)

    def _start(self, batch: int) -> Memory:
        return tuple(wide(t).expand(batch, -1, -1) for t in (self.gain, self.W, self.V))

    def _views(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., D) -> q, k, v, s: (..., D), and lr: (..., 1)."""
        s = self.store_norm(x)
        rate = self.max_lr * wide(self.to_adaptive_step(s)).sigmoid()
        maps = self.to_queries(self.retrieve_norm(x)), self.to_keys(s), self.to_values(s), s
        return *(wide(t) for t in maps), rate

    def _store(self, memory: Memory, momentum: Memory, gradient: Memory, mean: Tensor) -> tuple[Memory, Memory]:
        """The memory and S after a chunk. mean: (B, D), of s."""
        keep, forget = (
            F.linear(mean, wide(gate.weight), wide(gate.bias)).sigmoid().unsqueeze(-1)
            for gate in (self.to_momentum, self.to_decay_factor)
        )
        momentum = tuple(keep * S - G for S, G in zip(momentum, gradient, strict=True))
        return tuple((1 - forget) * M + S for M, S in zip(memory, momentum, strict=True)), momentum

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        size, length = self.size, x.shape[1]
        q, k, v, s, rate = self._views(x)
        with torch.autocast(x.device.type, enabled=False):
            # shifted by one: the last token of a chunk is asked after the chunk is stored
            asked = F.pad(q, (0, 0, 1, -(length + 1) % size)).split(size, dim=1)
            memory = start = self._start(x.shape[0])
            momentum: Memory = tuple(torch.zeros_like(t) for t in start)
            outputs = [recall(memory, asked[0])]
            for n in range(length // size):
                part = slice(n * size, (n + 1) * size)
                gradient = surprise(start if self.frozen else memory, k[:, part], v[:, part], rate[:, part])
                memory, momentum = self._store(memory, momentum, gradient, s[:, part].mean(1))
                outputs.append(recall(memory, asked[n + 1]))
            return torch.cat(outputs, dim=1)[:, 1 : length + 1].to(x.dtype)

    def cost(self, length: int) -> Cost:
        d_model, hidden = self.W.shape
        stored, asked = length // self.size, -(-(length + 1) // self.size)
        maps = 3 * Cost.linear(length, d_model, d_model, False) + Cost.linear(length, d_model, 1)
        maps += 2 * Cost.linear(stored, d_model, 1)
        products = d_model * hidden * self.size * (10.0 * stored + 4.0 * asked)
        other = stored * (12.0 * d_model * hidden) + self.size * (stored + asked) * (12.0 * hidden + 20.0 * d_model)
        return maps + Cost(products, other)

    def init_state(self, batch: int) -> State:
        start = self._start(batch)
        empty = [torch.zeros_like(t) for t in start]
        place = torch.zeros((), dtype=torch.int64, device=self.W.device)
        return place, *start, *empty, *empty, empty[0].squeeze(1)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the place in the chunk, the memory, S, and G and the sum of s over the chunk so far."""
        place, memory, momentum, gradient, total = state[0], state[1:4], state[4:7], state[7:10], state[10]
        q, k, v, s, rate = self._views(x)
        anchor = self._start(x.shape[0]) if self.frozen else memory
        with torch.autocast(x.device.type, enabled=False):
            now = surprise(anchor, k.unsqueeze(1), v.unsqueeze(1), rate.unsqueeze(1))
            gradient, total = tuple(G + part for G, part in zip(gradient, now, strict=True)), total + s
            place = place + 1
            if int(place) == self.size:
                memory, momentum = self._store(memory, momentum, gradient, total / self.size)
                gradient, total = tuple(torch.zeros_like(G) for G in gradient), torch.zeros_like(total)
                place = torch.zeros_like(place)
            y = recall(memory, q.unsqueeze(1)).squeeze(1).to(x.dtype)
        return y, (place, *memory, *momentum, *gradient, total)


class Titans(Stack):
    """expand: F / D. chunk: C. max_lr: largest rate of the memory's own training. frozen: take all derivatives at the
    memory a sequence starts with."""

    card = Card(
        title="Titans: Learning to Memorize at Test Time",
        year=2025,
        url="https://arxiv.org/abs/2501.00663",
        scaling="L",
        causal=True,
        variants={"frozen": {"frozen": True}},
        no_recall="not learned in 3,000 steps, also with ten times the max_lr; no reason in theory is known",
        exempt={
            "exports": "a Python loop over the chunks is unrolled for one length",
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        expand: float = 2.0,
        chunk: int = 16,
        max_lr: float = 0.1,
        frozen: bool = False,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        hidden = round(expand * d_model)
        at_least(1, chunk=chunk, hidden=hidden)
        if not 0 < max_lr < math.inf:
            raise ValueError(f"max_lr is {max_lr}; more than 0")
        super().__init__(
            lambda _: TitansMixer(d_model, hidden, chunk=chunk, max_lr=max_lr, frozen=frozen),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout, direction=direction, block=block,
        )  # fmt: skip
