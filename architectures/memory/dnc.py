"""DNC: a controller with a memory that it allocates, frees and reads back in the order in which it was written.

Graves et al. 2016, Nature 538, doi:10.1038/nature20101, methods and supplement. The controller is an LSTM of width H,
the memory M is (B, N, W), with R read heads and one write head. C(M, k, b) is the softmax over the slots of
b cos(k, M_i). Per token, all of lower case from h by one map, w' and r' those of the token before:

    h = LSTM([x, reads], h)                                (B, H)
    u = (u + w' - u w') prod_r (1 - f_r r'_r)              (B, N)      usage; f = sigmoid, free gates
    a = (1 - v_j) prod of v over the slots less used       (B, N)      allocation; v = 1e-6 + (1 - 1e-6) u
    w = g_w (g_a a + (1 - g_a) C(M, k_w, b_w))             (B, N)      write weighting; g = sigmoid, b = 1 + softplus
    M_i = M_i (1 - w_i e) + w_i z                                      e = sigmoid, z: (W)
    L_ij = (1 - w_i - w_j) L_ij + w_i p_j,  L_ii = 0       (B, N, N)   written i right after j
    p = (1 - sum of w) p + w                               (B, N)      precedence
    r = m_1 L' r' + m_2 L r' + m_3 C(M, k_r, b_r)          (B, R, N)   m = softmax: backward, forward, by content
    reads = r M                                            (B, R, W)
    y = W_y [h, reads] + b_y                               (B, D)

In the gradient of u, w' is a constant, as in the authors' code. Norms in cos are sqrt(sum of squares + 1e-6), and their
product has 1e-6 added, also as there. All state starts at 0.

Initialisation: LSTM as `ntm`, other maps as torch.nn.Linear.

Departures: a pre-norm residual block followed by a feed-forward part around the machine. The authors' code has
strengths of softplus alone, and clips the controller at 20.

The loop over time is Python's. Checked against: tensors of the authors' memory access, every part of its state at every
token, reads and gradient of x, with their strengths; a float64 loop over the equations, every gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

EPS = 1e-6
State = tuple[Tensor, ...]


def oneplus(x: Tensor) -> Tensor:
    return 1 + F.softplus(x)


def by_content(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """(B, N, W), (B, heads, W), (B, heads) -> weightings (B, heads, N)."""
    norms = [(t.square().sum(-1) + EPS).sqrt() for t in (keys, memory)]
    cosine = (keys @ memory.mT) / (norms[0].unsqueeze(2) * norms[1].unsqueeze(1) + EPS)
    return (strengths.unsqueeze(2) * cosine).softmax(-1)


def allocation(usage: Tensor) -> Tensor:
    """(B, N) -> weighting of the slots that are free, (B, N)."""
    used, order = (EPS + (1 - EPS) * usage).sort(dim=-1, stable=True)
    before = torch.cat([torch.ones_like(used[:, :1]), used[:, :-1]], dim=1).cumprod(1)
    return torch.zeros_like(used).scatter(1, order, (1 - used) * before)


class DNCMixer(Loop):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, *, hidden: int, slots: int, width: int, reads: int) -> None:
        super().__init__()
        self.sizes = hidden, slots, width, reads
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, d_model + reads * width))  # rows: i, f, g, o
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        # read keys, their strengths, write key, its strength, erase, write, free gates, two gates, modes
        self.parts = [reads * width, reads, width, 1, width, width, reads, 1, 1, 3 * reads]
        self.interface = nn.Linear(hidden, sum(self.parts))
        self.fc = nn.Linear(hidden + reads * width, d_model)
        for gate in range(4):
            nn.init.xavier_uniform_(self.weight_ih[gate * hidden : (gate + 1) * hidden])
            nn.init.orthogonal_(self.weight_hh[gate * hidden : (gate + 1) * hidden])
        nn.init.ones_(self.bias[hidden : 2 * hidden])

    def access(self, controls: Tensor, state: State) -> tuple[Tensor, State]:
        """controls: (B, interface) -> reads (B, R, W), and the state after them: memory (B, N, W), usage, write
        weighting and precedence (B, N), links (B, N, N), read weightings (B, R, N)."""
        memory, usage, written, precedence, link, read = state
        reads = self.sizes[3]
        read_keys, read_strengths, key, strength, erase, add, free, g_a, g_w, modes = controls.split(self.parts, dim=1)
        usage = usage + (1 - usage) * written.detach()
        usage = usage * (1 - free.sigmoid().unsqueeze(2) * read).prod(1)
        content = by_content(memory, key.unsqueeze(1), oneplus(strength)).squeeze(1)
        g_a = g_a.sigmoid()
        written = g_w.sigmoid() * (g_a * allocation(usage) + (1 - g_a) * content)
        row, column = written.unsqueeze(2), written.unsqueeze(1)
        memory = memory * (1 - row * erase.sigmoid().unsqueeze(1)) + row * add.unsqueeze(1)
        link = (1 - row - column) * link + row * precedence.unsqueeze(1)
        link = link * (1 - torch.eye(link.shape[1], dtype=link.dtype, device=link.device))
        precedence = (1 - written.sum(1, keepdim=True)) * precedence + written
        content = by_content(memory, read_keys.unflatten(1, (reads, -1)), oneplus(read_strengths))
        back, on, found = modes.unflatten(1, (reads, 3)).softmax(-1).split(1, dim=-1)
        read = back * (read @ link) + on * (read @ link.mT) + found * content
        return read @ memory, (memory, usage, written, precedence, link, read)

    def enter(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih[:, : x.shape[2]], self.bias)

    def weights(self) -> tuple[Tensor, ...]:
        _, _, width, reads = self.sizes
        recurrent = torch.cat([self.weight_hh, self.weight_ih[:, -reads * width :]], dim=1).T
        return recurrent, self.interface.weight.T, self.interface.bias

    def advance(self, entering: Tensor, state: State, *weights: Tensor) -> tuple[Tensor, State]:
        """State: [h, reads] (B, H + R W), c (B, H), and that of `access`."""
        given, c, *accessed = state
        recurrent, interface, bias = weights
        i, f, g, o = torch.addmm(entering, given, recurrent).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        reads, after = self.access(torch.addmm(bias, h, interface), tuple(accessed))
        y = torch.cat([h, reads.flatten(1)], dim=1)
        return y, (y, c, *after)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = super().chunk(x, state)
        return self.fc(y), state

    def cost(self, length: int) -> Cost:
        hidden, slots, width, reads = self.sizes
        d_model, given = self.fc.out_features, hidden + reads * width
        maps = Cost.linear(length, d_model, 4 * hidden) + Cost.linear(length, given, 4 * hidden, bias=False)
        maps += Cost.linear(length, hidden, sum(self.parts)) + Cost.linear(length, given, d_model)
        products = 2.0 * slots * width * (1 + 2 * reads) + 4.0 * reads * slots**2
        other = 12.0 * hidden + 7.0 * slots**2 + slots * (10.0 * width + 14.0 * reads + 30.0)
        return maps + Cost(length * products, length * other)

    def init_state(self, batch: int) -> State:
        hidden, slots, width, reads = self.sizes
        start = [self.zeros(batch, n) for n in (hidden + reads * width, hidden)]
        zeros = self.zeros(batch, slots)
        links, read = (zeros.new_zeros(batch, n, slots) for n in (slots, reads))
        return (*start, zeros.new_zeros(batch, slots, width), zeros, zeros, zeros, links, read)


class DNC(Stack):
    """hidden: width H of the controller, d_model unless given. slots: N. width: W of a slot. reads: R, read heads."""

    card = Card(
        title="Hybrid computing using a neural network with dynamic external memory",
        year=2016,
        url="https://doi.org/10.1038/nature20101",
        scaling="L",
        causal=True,
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self, *, d_model: int, hidden: int | None = None, slots: int = 32, width: int = 16, reads: int = 4, **stack: Any
    ) -> None:
        units = d_model if hidden is None else hidden
        at_least(1, hidden=units, slots=slots, width=width, reads=reads)
        super().__init__(
            lambda _: DNCMixer(d_model, hidden=units, slots=slots, width=width, reads=reads), d_model=d_model, **stack
        )
