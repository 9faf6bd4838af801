"""GRU: a recurrence whose update gate keeps the old state and whose reset gate hides it from the candidate.

Cho et al. 2014, arXiv:1406.1078, in the form of its first version, which cuDNN and torch.nn.GRU compute: the reset gate
acts after the recurrent product. Per token, with h: (B, H) and H = D:

    r = sigmoid(W_r x + b_r + U_r h)                       reset gate
    z = sigmoid(W_z x + b_z + U_z h)                       update gate: z = 1 keeps the state
    n = tanh(W_n x + b_n + r * (U_n h + c_n))              candidate
    h = z * h + (1 - z) * n                                the output, (B, H)

Variants:
    coupled        r = 1 - z; a unit that takes in the new lets its candidate see the old
    reset-first    n = tanh(W_n x + b_n + U_n (r * h) + c_n), the form of the paper's third version
    layernorm      n(W x) and n'(U h) in place of W x and U h, three gates at once, n a layer norm with gains and no
                   offset (Ba, Kiros and Hinton 2016, arXiv:1607.06450, in the form of haste)
    zoneout        in training each unit keeps its old value for a token with probability `zoneout`, in evaluation
                   h = zoneout h + (1 - zoneout) new h (Krueger et al. 2016, arXiv:1606.01305; 0.1 here)

Initialisation: U_r, U_z, U_n each orthogonal (as in the paper, after Saxe et al.); W Xavier uniform, because the
paper's Gaussian of 0.01 starves a deep stack; b_z = log(u), u uniform in [1, horizon - 1], the chrono rule of
arXiv:1804.11188: the gates start with memories from two tokens to `horizon`; other biases 0.

Departures: one layer is this recurrence in a pre-norm residual block followed by a feed-forward part, the setting in
which arXiv:2405.04517 (appendix B, "LSTM (Block)") reports recurrent networks on these tasks; the paper has neither.

Checked against: torch.nn.GRU; for every form a float64 loop over the equations above; outputs and gradients. layernorm
and zoneout: tensors of haste's LayerNormGRU and GRU, with stored masks and in evaluation, with the gradient of x.

layernorm and zoneout are loops over time in Python: `recurrent_cell` would need these cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._init import chrono
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.architectures._zoneout import checked, kept
from lra.encoder import Card, Cost, Mixer
from lra.kernels.recurrent_cell import recurrent_cell
from lra.kernels.recurrent_cell.layer import recurrent_layer


class GRUMixer(Mixer):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, horizon: int, coupled: bool = False, reset_first: bool = False, layernorm: bool = False,
        zoneout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.zoneout = zoneout
        self.gamma = nn.Parameter(torch.ones(2, 3 * d_model)) if layernorm else None  # gains of n and n'
        gates = 2 if coupled else 3
        self.cell = "gru_coupled" if coupled else "gru_reset_first" if reset_first else "gru"
        self.input = nn.Linear(d_model, gates * d_model)  # rows: r unless coupled, z, n
        self.U = nn.Parameter(torch.empty(gates * d_model, d_model))
        self.c = nn.Parameter(torch.zeros(gates * d_model))  # beside U h, as torch.nn has it for every gate
        for w_gate, u_gate in zip(self.input.weight.chunk(gates), self.U.chunk(gates), strict=True):
            nn.init.xavier_uniform_(w_gate)
            nn.init.orthogonal_(u_gate)
        nn.init.zeros_(self.input.bias)
        chrono(self.input.bias.data.chunk(gates)[-2], horizon)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.init_state(x.shape[0])
        if self.gamma is not None or self.zoneout:
            return self._loop(x, h)[0]
        return recurrent_layer(x, self.input.weight, self.input.bias, self.U, self.c, self.cell, h)

    def _loop(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        entering, outputs = wide(self._entering(x)), []
        h = wide(h)
        with torch.autocast(x.device.type, enabled=False):
            for token, keep in zip(entering.unbind(1), self.keeps(entering).unbind(1), strict=True):
                h = self._advance(token, h, keep)
                outputs.append(h)
        return torch.stack(outputs, dim=1).to(x.dtype), h

    def keeps(self, x: Tensor) -> Tensor:
        """Shares of the old h that the tokens of x keep: (B, L, H)."""
        return kept(x, self.U.shape[1], [self.zoneout], self.training)[0]

    def _entering(self, x: Tensor) -> Tensor:
        """W x + b, or n(W x) + b: (..., D) -> (..., G H)."""
        if self.gamma is None:
            return self.input(x)
        return nn.functional.layer_norm(
            wide(nn.functional.linear(x, self.input.weight)), (len(self.U),), wide(self.gamma[0]), wide(self.input.bias)
        )  # fmt: skip

    def cost(self, length: int) -> Cost:
        rows, width = self.U.shape
        return 2 * Cost.linear(length, width, rows) + Cost(other=20.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return self.U.new_zeros(batch, self.U.shape[1])

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        h = self._advance(self._entering(x), state, self.keeps(x.unsqueeze(1)).squeeze(1) if self.zoneout else None)
        return h, h

    def _advance(self, entering: Tensor, state: Tensor, keep: Tensor | None) -> Tensor:
        """The next h; keep: share of the old one that stays, (B, H)."""
        *reset, z, n = entering.chunk(len(self.U) // self.U.shape[1], dim=-1)
        U, c = wide(self.U), wide(self.c)
        turned = state @ U.T
        if self.gamma is not None:
            turned = nn.functional.layer_norm(turned, (len(U),), wide(self.gamma[1]))
        *u_reset, u_z, u_n = (turned + c).chunk(len(reset) + 2, dim=-1)
        z = torch.sigmoid(z + u_z)
        r = torch.sigmoid(reset[0] + u_reset[0]) if reset else 1 - z
        if self.cell == "gru_reset_first":
            width = U.shape[1]
            inside = (r * state) @ U[-width:].T + c[-width:]
        else:
            inside = r * u_n
        h = z * state + (1 - z) * torch.tanh(n + inside)
        return h if keep is None else torch.lerp(h, state, keep)

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.gamma is not None or self.zoneout:
            return self._loop(x, state)
        h, last = recurrent_cell(self.input(x), self.U, self.c, self.cell, state, return_state=True)
        return h, last


class GRU(Stack):
    """horizon: the longest memory, in tokens, that the update gates start with; `length` unless given, 2 for none.
    coupled: the reset gate is 1 - z. reset_first: the reset gate acts before the recurrent product.
    layernorm: norms inside the recurrence. zoneout: probability of a unit's old value to stay."""

    card = Card(
        title="Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
        year=2014,
        url="https://arxiv.org/abs/1406.1078",
        scaling="L",
        causal=True,
        variants={
            "coupled": {"coupled": True},
            "reset-first": {"reset_first": True},
            "layernorm": {"layernorm": True},
            "zoneout": {"zoneout": 0.1},
        },
        exempt={
            "layernorm/exports": "a Python loop over the tokens is unrolled for one length",
            "zoneout/exports": "a Python loop over the tokens is unrolled for one length",
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        horizon: int | None = None,
        coupled: bool = False,
        reset_first: bool = False,
        layernorm: bool = False,
        zoneout: float = 0.0,
        **stack: Any,
    ) -> None:
        reach = length if horizon is None else horizon
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        checked(zoneout=zoneout)
        if coupled + reset_first + layernorm > 1:
            raise ValueError("coupled, reset_first and layernorm exclude each other; set at most one")
        super().__init__(
            lambda _: GRUMixer(
                d_model, horizon=reach, coupled=coupled, reset_first=reset_first, layernorm=layernorm, zoneout=zoneout,
            ),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip
