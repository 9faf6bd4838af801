"""NTM: a controller that reads and writes a memory of N slots with weights by content and by location.

Graves, Wayne and Danihelka 2014, arXiv:1410.5401. The controller is an LSTM of width H, the memory M is (B, N, W). Per
token, with h of the controller and the read r of the token before:

    h = LSTM([x, r], h)                                    (B, H)
    each head, from h:  key k (W), beta = softplus > 0, g = sigmoid, s = softmax over 3 shifts, gamma = 1 + softplus
    w_c = softmax over the slots of beta cos(k, M_i)       (B, N)   by content, equations 5 and 6
    w_g = g w_c + (1 - g) w                                         interpolate with the head's last w, 7
    w_s(i) = s_0 w_g(i - 1) + s_1 w_g(i) + s_2 w_g(i + 1)           shift, round the ends, 8
    w = w_s^gamma / sum of w_s^gamma                                sharpen, 9
    read head   r = sum_i w(i) M_i                         (B, W)   of the memory before this token's write, 2
    write head  M_i = M_i (1 - w(i) e) + w(i) a            e = sigmoid (W), a (W), both from h;  3 and 4
    y = W_o [h, r] + b_o                                   (B, D)

One read head and one write head. Weightings start at 0, so that a head's first is its content's times g, sharpened.

Initialisation: the memory starts uniform within (N + W)^-1/2, drawn once and not learnt, r normal of deviation 0.01
likewise, h and c learnt from a normal of deviation 0.05, heads Xavier uniform of gain 1.4 with biases of deviation
0.01, as in the code compared with. LSTM: input maps Xavier uniform, recurrent ones orthogonal, biases 0 but 1 for
forget gates. The paper gives none of these.

Departures: a pre-norm residual block followed by a feed-forward part around the machine, whose output map ends linear.

The loop over time is Python's. Checked against: tensors of a public NTM, its memory, weightings, reads, outputs and
gradient of x; a float64 loop over the equations, every gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

SHIFTS = 3
State = tuple[Tensor, ...]


def address(controls: Tensor, memory: Tensor, before: Tensor) -> Tensor:
    """Weightings of heads: controls (B, heads, W + 6), memory (B, N, W), their last weightings (B, heads, N) -> the
    same."""
    key, beta, gate, shift, gamma = controls.split([memory.shape[2], 1, 1, SHIFTS, 1], dim=-1)
    norms = torch.linalg.vector_norm(key, dim=-1, keepdim=True) * torch.linalg.vector_norm(memory, dim=-1).unsqueeze(1)
    content = (F.softplus(beta) * (key @ memory.mT) / norms.clamp(min=1e-8)).softmax(-1)
    gate = gate.sigmoid()
    w = gate * content + (1 - gate) * before
    back, stay, on = shift.softmax(-1).split(1, dim=-1)
    w = back * w.roll(1, dims=-1) + stay * w + on * w.roll(-1, dims=-1)
    w = w ** (1 + F.softplus(gamma))
    return w / (w.sum(-1, keepdim=True) + 1e-16)


class NTMMixer(Loop):
    """(B, L, D) -> (B, L, D)."""

    memory0: Tensor
    read0: Tensor

    def __init__(self, d_model: int, *, hidden: int, slots: int, width: int) -> None:
        super().__init__()
        self.sizes = hidden, slots, width
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, d_model + width))  # rows: i, f, g, o
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.h0 = nn.Parameter(torch.randn(hidden) * 0.05)
        self.c0 = nn.Parameter(torch.randn(hidden) * 0.05)
        self.fc_read = nn.Linear(hidden, width + SHIFTS + 3)
        self.fc_write = nn.Linear(hidden, 3 * width + SHIFTS + 3)
        self.fc = nn.Linear(hidden + width, d_model)
        self.register_buffer("memory0", torch.empty(slots, width).uniform_(-1, 1) * (slots + width) ** -0.5)
        self.register_buffer("read0", torch.randn(width) * 0.01)
        for gate in range(4):
            nn.init.xavier_uniform_(self.weight_ih[gate * hidden : (gate + 1) * hidden])
            nn.init.orthogonal_(self.weight_hh[gate * hidden : (gate + 1) * hidden])
        nn.init.ones_(self.bias[hidden : 2 * hidden])
        for head in (self.fc_read, self.fc_write):
            nn.init.xavier_uniform_(head.weight, gain=1.4)
            nn.init.normal_(head.bias, std=0.01)

    def enter(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih[:, : x.shape[2]], self.bias)

    def weights(self) -> tuple[Tensor, ...]:
        width = self.sizes[2]
        recurrent = torch.cat([self.weight_hh, self.weight_ih[:, -width:]], dim=1).T
        heads = torch.cat([self.fc_read.weight, self.fc_write.weight]).T
        return recurrent, heads, torch.cat([self.fc_read.bias, self.fc_write.bias])

    def advance(self, entering: Tensor, state: State, *weights: Tensor) -> tuple[Tensor, State]:
        """State: h and c (B, H), read (B, W), memory (B, N, W), weightings of the read and the write head (B, 2, N)."""
        h, c, read, memory, before = state
        recurrent, to_heads, bias = weights
        width = self.sizes[2]
        i, f, g, o = torch.addmm(entering, torch.cat([h, read], dim=1), recurrent).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        controls, written = torch.addmm(bias, h, to_heads).tensor_split([2 * (width + SHIFTS + 3)], dim=1)
        w = address(controls.unflatten(1, (2, -1)), memory, before)
        read = (w[:, :1] @ memory).squeeze(1)
        erase, add = written.chunk(2, dim=1)
        at = w[:, 1].unsqueeze(2)
        memory = memory * (1 - at * erase.sigmoid().unsqueeze(1)) + at * add.unsqueeze(1)
        return torch.cat([h, read], dim=1), (h, c, read, memory, w)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = super().chunk(x, state)
        return self.fc(y), state

    def cost(self, length: int) -> Cost:
        hidden, slots, width = self.sizes
        d_model, controls = self.fc.out_features, self.fc_read.out_features + self.fc_write.out_features
        maps = Cost.linear(length, d_model, 4 * hidden) + Cost.linear(length, hidden + width, 4 * hidden, bias=False)
        maps += Cost.linear(length, hidden, controls) + Cost.linear(length, hidden + width, d_model)
        other = 12.0 * hidden + slots * (8.0 * width + 34.0)
        return maps + Cost(6.0 * length * slots * width, length * other)

    def init_state(self, batch: int) -> State:
        _, slots, _ = self.sizes
        given = (self.h0, self.c0, self.read0, self.memory0, self.memory0.new_zeros(2, slots))
        return tuple(wide(t).expand(batch, *t.shape) for t in given)


class NTM(Stack):
    """hidden: width H of the controller, d_model unless given. slots: N. width: W of a slot."""

    card = Card(
        title="Neural Turing Machines",
        year=2014,
        url="https://arxiv.org/abs/1410.5401",
        scaling="L",
        causal=True,
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self, *, d_model: int, hidden: int | None = None, slots: int = 128, width: int = 20, **stack: Any
    ) -> None:
        units = d_model if hidden is None else hidden
        at_least(1, hidden=units, width=width)
        at_least(SHIFTS, slots=slots)
        super().__init__(lambda _: NTMMixer(d_model, hidden=units, slots=slots, width=width), d_model=d_model, **stack)
