"""CfC: a closed-form approximation of a liquid time-constant network, so that no differential equation is solved.

Hasani, Lechner, Amini, Liebenwein, Ray, Tschaikowski, Teschl and Rus 2021, arXiv:2106.13898. Per token that comes a
time t after the one before (here 1), with h: (B, H), H = D, and b a network of two layers, 1.7159 tanh(0.666 a) each:

    z = b([x, h])                                          backbone: (B, U)
    f1, f2, a, c = linear maps of z, with biases           heads: (B, H) each
    default      h = (1 - g) tanh(f1) + g tanh(f2),   g = sigmoid(a t + c)
    no-gate      h = tanh(f1) + g tanh(f2)
    pure         h = A - A exp(-t (|w_tau| + |f1|)) f1     A, w_tau: (1, H), no other heads
    y = h                                                  the output, (B, H)

Variant mixed-memory: an LSTM step (candidate, input, forget and output gate; forget gate sigmoid(f + 1)) turns h into
the h that the default form takes; the LSTM's cell is carried beside it.

Variant ltc, the network that CfC approximates: Hasani, Lechner, Amini, Rus and Grosu 2020, arXiv:2006.04439. With units
v: (B, N), and the synapses i -> j of inputs (sensory) and units, s_ij = w_ij sigmoid(sigma_ij (v_i - mu_ij)):

    v_j <- (cm_j / dt v_j + gleak_j vleak_j + sum_i s_ij erev_ij) / (cm_j / dt + gleak_j + sum_i s_ij + 1e-8)

`unfolds` = 6 times a token, dt = t / 6: the fused solver, semi-implicit in v. Inputs pass through an affine map first,
units through a linear map to the D outputs. w, sensory_w, cm and gleak stay positive: values that a training step made
negative are put back to 0 before the next forward pass.

Initialisation: maps Xavier uniform, biases 0 (recurrent LSTM map orthogonal); A = 1, w_tau = 0 of pure. ltc as in ncps:
w in [0.001, 1], sigma in [3, 8], mu in [0.3, 0.8], gleak in [0.001, 1], vleak in [-0.2, 0.2], cm in [0.4, 0.6], all
uniform; erev 1 or -1 by chance; affine map the identity.

Departures: ltc is fully wired, without the sparse graph of ncps, and its outputs are a linear map of all units, where
ncps has an affine map of the first ones; a pre-norm residual block followed by a feed-forward part around the network.

The loop over time is Python's: an operator would need a network inside a step. ltc holds B N (D + 6 N) numbers a token
for its backward pass.

Checked against: tensors of ncps (all forms, irregular times), with the gradient of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._checks import at_least
from lra.architectures._optim import undecayed
from lra.architectures._recurrence import Timed
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer

MODES = ("default", "no-gate", "pure")
State = tuple[Tensor, Tensor]


def lecun_tanh(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(0.666 * x)


def _linear(d_in: int, d_out: int, bias: bool = True) -> nn.Linear:
    part = nn.Linear(d_in, d_out, bias=bias)
    nn.init.xavier_uniform_(part.weight)
    if bias:
        nn.init.zeros_(part.bias)
    return part


class CfCMixer(Timed):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). units: width of the backbone."""

    def __init__(self, d_model: int, units: int, mode: str, mixed_memory: bool) -> None:
        super().__init__()
        self.d_model, self.units, self.mode = d_model, units, mode
        self.backbone = nn.ModuleDict({"0": _linear(2 * d_model, units), "2": _linear(units, units)})
        self.ff1 = _linear(units, d_model)
        heads = 1 if mode == "pure" else 4
        self.ff2, self.time_a, self.time_b = (
            _linear(units, d_model) if heads == 4 else None for _ in range(3)
        )  # fmt: skip
        self.w_tau = nn.Parameter(torch.zeros(1, d_model)) if mode == "pure" else None
        self.A = nn.Parameter(torch.ones(1, d_model)) if mode == "pure" else None
        self.lstm = None
        if mixed_memory:
            maps = {"input_map": _linear(d_model, 4 * d_model), "recurrent_map": _linear(d_model, 4 * d_model, False)}
            self.lstm = nn.ModuleDict(maps)
            for gate in maps["recurrent_map"].weight.chunk(4):
                nn.init.orthogonal_(gate)

    def project(self, x: Tensor) -> Tensor:
        """What the token adds in the first layer of the backbone, and in the LSTM."""
        first = cast(nn.Linear, self.backbone["0"])
        entering = nn.functional.linear(x, first.weight[:, : self.d_model], first.bias)
        return entering if self.lstm is None else torch.cat([entering, self.lstm["input_map"](x)], dim=-1)

    def weights(self) -> tuple[Tensor, ...]:
        first, second = cast(nn.Linear, self.backbone["0"]), cast(nn.Linear, self.backbone["2"])
        heads = [part for part in (self.ff1, self.ff2, self.time_a, self.time_b) if part is not None]
        shared = (
            first.weight[:, self.d_model :].T, second.weight.T, second.bias,
            torch.cat([part.weight for part in heads]).T, torch.cat([part.bias for part in heads]),
        )  # fmt: skip
        return shared if self.lstm is None else (*shared, cast(nn.Linear, self.lstm["recurrent_map"]).weight.T)

    def advance(self, entering: Tensor, state: Any, *weights: Tensor) -> tuple[Tensor, Any]:
        """State: h (B, D), with mixed memory also the LSTM's cell (B, D)."""
        W_h, W_2, b_2, W_heads, b_heads, *recurrent = weights
        entering, t = entering[:, :-1], entering[:, -1:]
        h = state
        if recurrent:
            h, c = state
            entering, gates = entering.split([self.units, 4 * self.d_model], dim=-1)
            new, i, f, o = (gates + h @ recurrent[0]).chunk(4, dim=-1)
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(new)
            h = torch.sigmoid(o) * torch.tanh(c)
        z = lecun_tanh(torch.addmm(b_2, lecun_tanh(torch.addmm(entering, h, W_h)), W_2))
        f1, *others = torch.addmm(b_heads, z, W_heads).split(self.d_model, dim=-1)
        if self.A is not None and self.w_tau is not None:
            h = self.A - self.A * torch.exp(-t * (self.w_tau.abs() + f1.abs())) * f1
        else:
            f2, a, b = others
            g = torch.sigmoid(a * t + b)
            h = torch.tanh(f1) * (1 - g if self.mode == "default" else 1) + g * torch.tanh(f2)
        return h, (h, c) if recurrent else h

    def cost(self, length: int) -> Cost:
        width, units, heads = self.d_model, self.units, 1 if self.mode == "pure" else 4
        work = Cost.linear(length, 2 * width, units) + Cost.linear(length, units, units)
        work = work + Cost.linear(length, units, heads * width) + Cost(other=length * (10.0 * units + 20.0 * width))
        if self.lstm is None:
            return work
        return work + 2 * Cost.linear(length, width, 4 * width) + Cost(other=25.0 * length * width)

    def init_state(self, batch: int) -> Any:
        h = self.zeros(batch, self.d_model)
        return h if self.lstm is None else (h, torch.zeros_like(h))


class LTCMixer(Timed):
    """The network that CfC approximates: (B, L, D) -> (B, L, D). units: N."""

    sigma: nn.Parameter
    mu: nn.Parameter
    w: nn.Parameter
    erev: nn.Parameter
    sensory_sigma: nn.Parameter
    sensory_mu: nn.Parameter
    sensory_w: nn.Parameter
    sensory_erev: nn.Parameter

    def __init__(self, d_model: int, units: int, unfolds: int) -> None:
        super().__init__()
        self.d_model, self.units, self.unfolds = d_model, units, unfolds

        def uniform(low: float, high: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(low, high))

        self.gleak, self.vleak = uniform(0.001, 1, units), uniform(-0.2, 0.2, units)
        self.cm = uniform(0.4, 0.6, units)
        for prefix, sources in (("", units), ("sensory_", d_model)):
            for name, low, high in (("sigma", 3, 8), ("mu", 0.3, 0.8), ("w", 0.001, 1)):
                self.register_parameter(prefix + name, uniform(low, high, sources, units))
            signs = torch.randint(2, (sources, units)) * 2.0 - 1
            self.register_parameter(prefix + "erev", nn.Parameter(signs))
        self.input_w, self.input_b = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.out = _linear(units, d_model)

    def project(self, x: Tensor) -> Tensor:
        return x * self.input_w + self.input_b

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: v (B, N)."""
        for parameter in (self.w, self.sensory_w, self.cm, self.gleak):
            parameter.data.clamp_(min=0)  # .data: a projection after an optimiser's step, not a part of the function
        v, state = super().chunk(x, state)
        return self.out(v), state

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        capacity = self.cm * self.unfolds / entering[:, -1:]
        s = _synapses(entering[:, :-1], self.sensory_sigma, self.sensory_mu, self.sensory_w)
        charge = self.gleak * self.vleak + (s * self.sensory_erev).sum(1)
        conductance = capacity + self.gleak + s.sum(1) + 1e-8
        v = state
        for _ in range(self.unfolds):
            s = _synapses(v, self.sigma, self.mu, self.w)
            v = (capacity * v + charge + (s * self.erev).sum(1)) / (conductance + s.sum(1))
        return v, v

    def cost(self, length: int) -> Cost:
        synapses = self.units * (self.d_model + self.unfolds * self.units)
        work = Cost(other=length * (9.0 * synapses + 2.0 * self.d_model + 6.0 * self.unfolds * self.units))
        return work + Cost.linear(length, self.units, self.d_model)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.units)


def _synapses(v: Tensor, sigma: Tensor, mu: Tensor, w: Tensor) -> Tensor:
    """w sigmoid(sigma (v - mu)): (B, sources, targets) of v (B, sources)."""
    return w * torch.sigmoid(sigma * (v.unsqueeze(2) - mu))


class CfC(Stack):
    """mode: of MODES, or "ltc". mixed_memory: an LSTM step before each step of the default mode. units: width of the
    backbone, `d_model` unless given; of ltc its units, 32 unless given. unfolds: solver steps a token of ltc."""

    card = Card(
        title="Closed-form Continuous-time Neural Models",
        year=2021,
        url="https://arxiv.org/abs/2106.13898",
        scaling="L",
        causal=True,
        variants={
            "no-gate": {"mode": "no-gate"},
            "pure": {"mode": "pure"},
            "mixed-memory": {"mixed_memory": True},
            "ltc": {"mode": "ltc"},
        },
        no_recall="its state passes through three tanh at every step, so the gradient of the first token vanishes",
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self,
        *,
        d_model: int,
        mode: str = "default",
        mixed_memory: bool = False,
        units: int | None = None,
        unfolds: int = 6,
        **stack: Any,
    ) -> None:
        if mode not in (*MODES, "ltc"):
            raise ValueError(f"mode is {mode!r}; one of {', '.join(MODES)}, ltc")
        if mixed_memory and mode != "default":
            raise ValueError("mixed_memory needs the default mode")
        at_least(1, units=units, unfolds=unfolds)

        def make(_: int) -> Mixer:
            if mode == "ltc":
                return LTCMixer(d_model, units or 32, unfolds)
            return CfCMixer(d_model, units or d_model, mode, mixed_memory)

        super().__init__(make, d_model=d_model, **stack)
        self.mode = mode

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A") if self.mode == "pure" else {}
