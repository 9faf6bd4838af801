"""LSTM: a recurrence with an additive cell and input, forget and output gates.

Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of Gers, Schmidhuber and Cummins
2000, the form that cuDNN and torch.nn.LSTM compute. Per token, with c, h: (B, H) and H = D:

    i = sigmoid(W_i x + U_i h + b_i)                       input gate
    f = sigmoid(W_f x + U_f h + b_f)                       forget gate: f = 1 keeps the cell
    g = tanh(W_g x + U_g h + b_g)                          candidate
    c = f * c + i * g
    o = sigmoid(W_o x + U_o h + b_o)                       output gate
    h = o * tanh(c)                                        the output, (B, H)

Variants, after Greff et al. 2015, arXiv:1503.04069:
    peephole            i and f also see p_i * c and p_f * c before the step, o sees p_o * c after it
    coupled             f = 1 - i
    coupled-peephole    both
and, after Ba, Kiros and Hinton 2016, arXiv:1607.06450, n a layer norm over what it is given, with gains and no offset:
    layernorm           n(W x) + n'(U h) + b in place of W x + U h + b, four gates at once;  h = o * tanh(n''(c) + q)
    layernorm-carried   the same, and n''(c) + q is the cell that the next token finds, as in PyTorch's benchmark of
                        custom LSTMs

Regularisers, in training, for any variant:
    zoneout             each unit of c keeps its old value for a token with probability zoneout_c, each of h with
                        zoneout_h; h is made from the new c; in evaluation the two values are mixed by these rates
                        (Krueger et al. 2016, arXiv:1606.01305; 0.5 and 0.05, as for characters there)
    weight-drop         entries of U are zero with probability weight_drop for a whole batch, the others over
                        1 - weight_drop (Merity, Keskar and Socher 2017, arXiv:1708.02182; 0.5, as there)

Initialisation: U of each gate orthogonal, W Xavier uniform, gains 1, p, q and the other biases 0. Forget gates start
with memories from two tokens to `length`: b_f = log(u), u uniform in [1, length - 1], b_i = -b_f, the chrono rule of
arXiv:1804.11188; a number for `forget_bias` is used instead (1: Jozefowicz et al. 2015), with b_i = 0. Coupled, b_i =
-b_f alone.

Departures: one bias a gate (torch.nn has two that act as their sum). One layer is this recurrence in a pre-norm
residual block followed by a feed-forward part, the setting in which arXiv:2405.04517 (appendix B, "LSTM (Block)")
reports recurrent networks on these tasks; the papers have neither.

Checked against: torch.nn.LSTM; closed forms of the variants that agree with onnxruntime's LSTM; tensors of haste's
LayerNormLSTM and of a closed form of PyTorch's LayerNormLSTMCell; outputs and gradients. Zoneout: its equations in
closed form and haste's LSTM (h alone); weight-drop: the authors' WeightDrop; each with stored masks and in evaluation,
with the gradient of x.

Zoneout is a loop over time in Python: `recurrent_cell` would need cells with masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._init import chrono
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.architectures._zoneout import checked, kept
from lra.encoder import Card, Cost, Mixer
from lra.kernels.recurrent_cell import recurrent_cell
from lra.kernels.recurrent_cell.layer import recurrent_layer

State = tuple[Tensor, Tensor]


class LSTMMixer(Mixer):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, peephole: bool, coupled: bool, horizon: int, forget_bias: float | None,
        layernorm: bool = False, carried: bool = False, zoneout: tuple[float, float] = (0.0, 0.0),
        weight_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.zoneout, self.weight_drop = zoneout, weight_drop  # of c and h; of U
        gates = 3 if coupled else 4
        normed = "lstm_layernorm_carried" if carried else "lstm_layernorm"
        self.cell = "lstm_coupled" if coupled else normed if layernorm else "lstm"
        self.input = nn.Linear(d_model, gates * d_model)  # rows: i, f unless coupled, g, o
        self.U = nn.Parameter(torch.empty(gates * d_model, d_model))
        self.p = nn.Parameter(torch.zeros(gates - 1, d_model)) if peephole else None  # rows: i, f unless coupled, o
        self.gain = nn.Parameter(torch.ones(4 * d_model)) if layernorm else None  # of n
        ones, zero = torch.ones(5, d_model), torch.zeros(1, d_model)
        self.norm = nn.Parameter(torch.cat([ones, zero])) if layernorm else None  # rows: n', gate by gate; n''; q
        for w_gate, u_gate in zip(self.input.weight.chunk(gates), self.U.chunk(gates), strict=True):
            nn.init.xavier_uniform_(w_gate)
            nn.init.orthogonal_(u_gate)
        nn.init.zeros_(self.input.bias)
        keep = chrono(torch.empty(d_model), horizon)
        if forget_bias is not None:
            keep.fill_(forget_bias)
        biases = self.input.bias.data.chunk(gates)
        if coupled or forget_bias is None:
            biases[0].copy_(-keep)
        if not coupled:
            biases[1].copy_(keep)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        U, (h, c) = F.dropout(self.U, self.weight_drop, self.training), self.init_state(x.shape[0])
        if any(self.zoneout):
            return self._zoned_out(x, U, (h, c))[0]
        if self.cell == "lstm" and self.p is None:
            return recurrent_layer(x, self.input.weight, self.input.bias, U, None, "lstm", h, c0=c)
        bias = None if self.norm is None else self.input.bias
        y = recurrent_cell(self._entering(x), U, bias, self.cell, h, c0=c, peephole=self.p, norm=self.norm)
        return cast(Tensor, y)

    def _zoned_out(self, x: Tensor, U: Tensor, state: State) -> tuple[Tensor, State]:
        entering, outputs = wide(self._entering(x)), []
        with torch.autocast(x.device.type, enabled=False):
            U, keeps, state = wide(U), self.keeps(entering), (wide(state[0]), wide(state[1]))
            for token, keep_c, keep_h in zip(entering.unbind(1), *(k.unbind(1) for k in keeps), strict=True):
                y, state = self._advance(token, state, U, (keep_c, keep_h))
                outputs.append(y)
        return torch.stack(outputs, dim=1).to(x.dtype), state

    def keeps(self, x: Tensor) -> Tensor:
        """Shares of the old c and h that the tokens of x keep: (2, B, L, H)."""
        return kept(x, self.U.shape[1], self.zoneout, self.training)

    def _entering(self, x: Tensor) -> Tensor:
        """W x + b, or n(W x) without b: (..., D) -> (..., 4 H)."""
        if self.norm is None:
            return self.input(x)
        return F.layer_norm(wide(F.linear(x, self.input.weight)), (len(self.U),), wide(cast(Tensor, self.gain)))

    def cost(self, length: int) -> Cost:
        rows, width = self.U.shape
        return 2 * Cost.linear(length, width, rows) + Cost(other=(25.0 if self.norm is None else 90.0) * length * width)

    def init_state(self, batch: int) -> State:
        zero = self.U.new_zeros(batch, self.U.shape[1])
        return zero, zero

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: h and c, (B, H) each. All of U is used, in training too."""
        keeps = self.keeps(x.unsqueeze(1)).squeeze(2) if any(self.zoneout) else None
        return self._advance(self._entering(x), state, self.U, keeps)

    def _advance(
        self, entering: Tensor, state: State, U: Tensor, keeps: Sequence[Tensor] | Tensor | None
    ) -> tuple[Tensor, State]:
        """One token; keeps: shares of the old c and h that stay, (B, H) each."""
        h, c = state
        inside = h @ U.T
        if self.norm is not None:
            inside = F.layer_norm(inside, (len(U),), self.norm[:4].flatten(), self.input.bias)
        inside = entering + inside
        parts = inside.chunk(len(self.U) // self.U.shape[1], dim=-1)
        p = self.U.new_zeros(len(parts) - 1, self.U.shape[1]) if self.p is None else self.p
        i = torch.sigmoid(parts[0] + p[0] * c)
        f = 1 - i if self.cell == "lstm_coupled" else torch.sigmoid(parts[1] + p[1] * c)
        new_c = f * c + i * torch.tanh(parts[-2])
        shown = new_c if self.norm is None else F.layer_norm(new_c, c.shape[1:], self.norm[4], self.norm[5])
        new_h = torch.sigmoid(parts[-1] + p[-1] * new_c) * torch.tanh(shown)
        new_c = shown if self.cell == "lstm_layernorm_carried" else new_c
        if keeps is not None:
            new_c, new_h = torch.lerp(new_c, c, keeps[0]), torch.lerp(new_h, h, keeps[1])
        return new_h, (new_h, new_c)

    def chunk(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if any(self.zoneout):
            return self._zoned_out(x, self.U, state)
        x, b = (self.input(x), None) if self.norm is None else (self._entering(x), self.input.bias)
        y, h, c = recurrent_cell(
            x, self.U, b, self.cell, state[0], c0=state[1], peephole=self.p, norm=self.norm, return_state=True
        )
        return y, (h, c)


class LSTM(Stack):
    """peephole: gates see the cell. coupled: the forget gate is 1 - i. layernorm: norms inside the recurrence. carried:
    the normed cell is carried on. forget_bias: where every forget gate starts, before the sigmoid; unless given they
    spread over memories of up to `length` tokens. zoneout_c, zoneout_h: probabilities of a unit's old cell and output
    to stay. weight_drop: probability of a recurrent weight to be dropped."""

    card = Card(
        title="Long Short-Term Memory",
        year=1997,
        url="https://doi.org/10.1162/neco.1997.9.8.1735",
        scaling="L",
        causal=True,
        variants={
            "peephole": {"peephole": True},
            "coupled": {"coupled": True},
            "coupled-peephole": {"coupled": True, "peephole": True},
            "layernorm": {"layernorm": True},
            "layernorm-carried": {"layernorm": True, "carried": True},
            "zoneout": {"zoneout_c": 0.5, "zoneout_h": 0.05},
            "weight-drop": {"weight_drop": 0.5},
        },
        exempt={
            "zoneout/exports": "a Python loop over the tokens is unrolled for one length",
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        peephole: bool = False,
        coupled: bool = False,
        layernorm: bool = False,
        carried: bool = False,
        forget_bias: float | None = None,
        zoneout_c: float = 0.0,
        zoneout_h: float = 0.0,
        weight_drop: float = 0.0,
        **stack: Any,
    ) -> None:
        checked(zoneout_c=zoneout_c, zoneout_h=zoneout_h, weight_drop=weight_drop)
        if layernorm and (peephole or coupled):
            raise ValueError("layernorm is for the plain cell; leave out peephole and coupled")
        if carried and not layernorm:
            raise ValueError("carried needs layernorm = True")
        super().__init__(
            lambda _: LSTMMixer(
                d_model, peephole=peephole, coupled=coupled, horizon=length, forget_bias=forget_bias,
                layernorm=layernorm, carried=carried, zoneout=(zoneout_c, zoneout_h), weight_drop=weight_drop,
            ),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip
