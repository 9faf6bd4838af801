"""GRU: a recurrence whose update gate keeps the old state and whose reset gate hides it from the candidate.

Cho et al. 2014, arXiv:1406.1078, in the form of its first version, which cuDNN and torch.nn.GRU compute: the reset gate
acts after the recurrent product. Per token, with h: (B, H) and H = D:

    r = sigmoid(W_r x + b_r + U_r h)                       reset gate
    z = sigmoid(W_z x + b_z + U_z h)                       update gate: z = 1 keeps the state
    n = tanh(W_n x + b_n + r * (U_n h + c_n))              candidate
    h = z * h + (1 - z) * n                                the output, (B, H)

Initialisation: U_r, U_z, U_n each orthogonal (as in the paper, after Saxe et al.); W Xavier uniform, because the
paper's Gaussian of 0.01 starves a deep stack; b_z = log(u), u uniform in [1, horizon - 1], the chrono rule of
arXiv:1804.11188: the gates start with memories from one token to `horizon`; other biases 0.

Departures: version 3 of the paper applies the reset gate to h before U_n. One layer is this recurrence in a pre-norm
residual block followed by a feed-forward part, the setting in which arXiv:2405.04517 (appendix B, "LSTM (Block)")
reports recurrent networks on these tasks; the paper has neither.

Checked against: a float64 loop over the equations above, outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.recurrent_cell import recurrent_cell


class GRUMixer(Mixer):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, horizon: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(d_model, d_model, batch_first=True)
        w, u, b, c = self.rnn.parameters()  # rows of each: r, z, n
        for w_gate, u_gate in zip(w.chunk(3), u.chunk(3), strict=True):
            nn.init.xavier_uniform_(w_gate)
            nn.init.orthogonal_(u_gate)
        nn.init.zeros_(b)
        nn.init.zeros_(c)
        with torch.no_grad():
            b.chunk(3)[1].uniform_(1, max(horizon - 1, 1)).log_()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # cuDNN's loop is the fast one on a GPU; on a CPU PyTorch dispatches several small operators per token
        if x.device.type == "cuda":
            return self.rnn(x)[0]
        w, u, b, c = self.rnn.parameters()
        return cast(Tensor, recurrent_cell(F.linear(x, w, b), u, c, "gru"))

    def cost(self, length: int) -> Cost:
        width = self.rnn.hidden_size
        return 2 * Cost.linear(length, width, 3 * width) + Cost(other=20.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return next(self.rnn.parameters()).new_zeros(batch, self.rnn.hidden_size)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        h = torch.gru_cell(x, state, *self.rnn.parameters())
        return h, h


class GRU(Stack):
    """horizon: the longest memory, in tokens, that the update gates start with; `length` unless given, 2 for none."""

    card = Card(
        title="Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
        year=2014,
        url="https://arxiv.org/abs/1406.1078",
        family="recurrent",
        scaling="L",
        causal=True,
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        horizon: int | None = None,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        reach = length if horizon is None else horizon
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        super().__init__(
            lambda _: GRUMixer(d_model, reach),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout, direction=direction, block=block,
        )  # fmt: skip
