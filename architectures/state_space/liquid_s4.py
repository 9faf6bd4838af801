"""Liquid-S4: S4 with products of inputs in addition to the inputs, as from a state matrix that depends on the input.

Hasani, Lechner, Wang, Chahine, Amini and Rus 2022, arXiv:2209.12951. The model is x_t = (Abar + Bbar u_t) x_{t-1} +
Bbar u_t; unrolled, it is S4 and terms in products of p = 2 .. `degree` inputs:

    z_t = (K * u)_t + D u_t + sum_p c_p(t)               (B, L, D)   K: kernel of S4, diagonal minus rank 1, M modes
    out = GLU(W gelu(z) + b)                             (B, L, D)   value half times sigmoid(gate half)

The paper sets the terms only up to the order of the products. What its authors ran, and what stands here, is, for a
sequence of l tokens read from its end, v_j = u_{l-1-j}:

    all    q_p(t) = prod_{j in S_t} v_j                  S_t: the t-th subset of p places, by largest, next largest, ...
    shift  q_p(t) = q_{p-1}(t) q_{p-1}(t + 1),  q_1 = v  2^(p-1) inputs, some of them twice
    dB = dt B / (1 - dt A / 2),  s = 2 Re sum_m dB_m,  g_p = s^(2^(p-1) - 1)           (H,) each; P plays no part
    pb   c_p(t) = 2 Re(sum_m Cl_m dB_m) g_p q_p(t)       Abar of these terms set to 1
    kb   c_p = irfft(fft(K g_p, l + 1) rfft(q_p, 2 l))   bin by bin; as the two grids differ, no convolution with K

`contract` takes the tanh of every product. So a token's output depends on the end of the sequence: Liquid-S4 as
released is not causal, whatever its kernel. With `ways` = 2 a second kernel and a second Cl look ahead, the latter with
q_p(l - 1 - t); pb alone.

Initialisation: that of S4 (HiPPO-LegS); Cl starts as the conjugate of C, as released.

Departures from the released code: Cl, which it keeps apart from the C of the kernel and never updates, is learnt. From
the paper: it has one C for both.

Checked against: tensors of the authors' S4 layer with liquid kernels pb (degrees 2 and 3; all and shift; both ways)
and kb: kernel, correction, output, gradient of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._dplr import DPLRSSM, check_dplr
from lra.architectures._dropout import Dropout
from lra.architectures._precision import wide
from lra.architectures._ssm import checked_copies
from lra.architectures._stack import Block, Stack, flip
from lra.encoder import Card, Cost, Mixer, fill_padding, lengths_of
from lra.kernels.fft_conv import fft_conv

LIQUIDS = ("pb", "kb")
PRODUCTS = ("all", "shift")


def subsets(length: int, degree: int) -> Tensor:
    """The first `length` subsets of `degree` places, by largest place, then next largest: (length, degree)."""
    places = degree
    while comb(places, degree) < length:
        places += 1
    ordered = sorted(combinations(range(places), degree), key=lambda subset: subset[::-1])
    return torch.tensor(ordered[:length])


class LiquidS4Mixer(DPLRSSM, Mixer):
    """(B, L, D) -> (B, L, D). Products are counted from the end of the real tokens, so that padding has no part."""

    def __init__(
        self, d_model: int, *, length: int, state_size: int, init: str, dt_min: float, dt_max: float, n_ssm: int,
        ways: int, degree: int, liquid: str, products: str, contract: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model,
            length=length,
            state_size=state_size,
            init=init,
            dt_min=dt_min,
            dt_max=dt_max,
            n_ssm=n_ssm,
            ways=ways,
        )
        self.degree, self.liquid, self.products, self.contract = degree, liquid, products, contract
        if liquid == "pb":
            self.C_liquid = nn.Parameter(torch.view_as_real(self.output().conj().resolve_conj()).float())
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Linear(d_model, 2 * d_model)
        self.dropout = Dropout(dropout)
        for p in range(2, degree + 1) if products == "all" else ():
            self.register_buffer(f"subsets_{p}", subsets(length, p))

    def _products(self, v: Tensor, p: int) -> Tensor:
        """q_p: (B, L, D) -> (B, L, D). No token, no product: beyond the real ones v is zero."""
        if self.products == "shift":
            for _ in range(p - 1):
                v = v * F.pad(v, (0, 0, 0, 1))[:, 1:]
            return v
        places = self.get_buffer(f"subsets_{p}")[: v.shape[1]].T
        padded = F.pad(v, (0, 0, 0, p))
        q = padded[:, places[0]]
        for others in places[1:]:
            q = q * padded[:, others]
        return q

    def _discrete_B(self) -> tuple[Tensor, Tensor]:
        """dB: (H, M) complex and s: (H,)."""
        A, _, B, dt = self._continuous()
        dB = dt.unsqueeze(-1) * B / (1 - dt.unsqueeze(-1) * A / 2)
        return dB, 2 * dB.sum(-1).real

    def correction(self, x: Tensor, mask: Tensor, kernel: Tensor) -> Tensor:
        """The sum of c_p: (B, L, D) -> (B, L, D). kernel: (ways, D, L)."""
        v = flip(fill_padding(x, mask), mask)
        dB, s = self._discrete_B()
        total = torch.zeros_like(v)
        for p in range(2, self.degree + 1):
            q, gain = wide(self._products(v, p)), s ** (2 ** (p - 1) - 1)
            q = q.tanh() if self.contract else q
            if self.liquid == "kb":
                total = total + self._spectral(q, kernel[0] * gain.unsqueeze(-1), mask)
                continue
            weights = 2 * (torch.view_as_complex(wide(self.C_liquid)) * dB).sum(-1).real  # (ways, H)
            total = total + weights[0] * gain * q
            if len(weights) == 2:
                total = total + weights[1] * gain * flip(q, mask)
        return total

    def _spectral(self, q: Tensor, kernel: Tensor, mask: Tensor) -> Tensor:
        """irfft(fft(kernel, l + 1) rfft(q, 2 l)) for each length l that occurs in the batch."""
        lengths = lengths_of(mask)
        if lengths.is_meta:
            return _mismatched(q, kernel)
        y = torch.zeros_like(q)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            part = _mismatched(q[rows, :length], kernel[:, :length])
            y = y.index_copy(0, rows, F.pad(part, (0, 0, 0, q.shape[1] - length)))
        return y

    def ssm(self, x: Tensor, mask: Tensor) -> Tensor:
        """z of the equations: (B, L, D) -> (B, L, D)."""
        K = self.kernel(x.shape[1])
        y = fft_conv(x, K[0] if len(K) == 1 else K, self.D, bidirectional=len(K) == 2)
        return y + self.correction(x, mask, K)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(self.ssm(x, mask)))), dim=-1)

    def cost(self, length: int) -> Cost:
        width, terms = len(self.D), self.degree - 1
        liquid = terms * width * length * (self.degree + 4.0)
        if self.liquid == "kb":
            liquid += terms * self.convolution_cost(length).other
        maps = Cost.linear(length, width, 2 * width)
        return maps + self.convolution_cost(length) + Cost(other=liquid + 20.0 * length * width)


def _mismatched(q: Tensor, kernel: Tensor) -> Tensor:
    """q: (B, l, D), kernel: (D, l) -> (B, l, D)."""
    length = q.shape[1]
    spectrum = torch.fft.fft(kernel, n=length + 1, dim=-1).mT * torch.fft.rfft(q, n=2 * length, dim=1)
    return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length]


class LiquidS4(Stack):
    """degree: of the highest products. liquid: pb or kb. products: all or shift. contract: tanh of every product.
    ways: 1, a kernel that looks back, or 2, one each way. state_size: N, even. n_ssm: independent state matrices,
    d_model unless given, which it divides. init: legs, fout, legt or hippo. dt_min, dt_max: range of the initial step
    sizes. ssm_lr: highest learning rate of A, B and P, dt_lr: of dt."""

    card = Card(
        title="Liquid Structural State-Space Models",
        year=2022,
        url="https://arxiv.org/abs/2209.12951",
        scaling="L log L",
        causal=False,
        variants={
            "pb": {"liquid": "pb"},
            "kb": {"liquid": "kb", "ways": 1},
            "shift": {"products": "shift"},
        },
        exempt={
            "optim_norms": "the released optimiser, that of S4, spares the kernel's own parameters alone",
            "exports": "torch.export makes a case of its own of the full length",
        },
    )
    refuses_causal = True
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "bidirectional",
        degree: int = 2,
        liquid: str = "pb",
        products: str = "all",
        contract: bool = False,
        ways: int = 2,
        state_size: int = 64,
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        ssm_lr: float = 0.001,
        dt_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; bidirectional, the products are read from the end")
        for name, value, known in (("liquid", liquid, LIQUIDS), ("products", products, PRODUCTS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; one of {', '.join(known)}")
        if degree < 2:
            raise ValueError(f"degree is {degree}; at least 2, or there is no product")
        if ways not in (1, 2):
            raise ValueError(f"ways is {ways}; 1 or 2")
        if liquid == "kb" and ways == 2:
            raise ValueError("ways is 2; 1, as liquid is 'kb', which no source gives both ways")
        copies = checked_copies(n_ssm, d_model)
        check_dplr(state_size, init, copies)
        self.ssm_lr, self.dt_lr = ssm_lr, dt_lr
        super().__init__(
            lambda _: LiquidS4Mixer(
                d_model, length=length, state_size=state_size, init=init, dt_min=dt_min, dt_max=dt_max, n_ssm=copies,
                ways=ways, degree=degree, liquid=liquid, products=products, contract=contract, dropout=dropout,
            ),
            native=True, d_model=d_model, length=length, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        rates = {"log_dt": self.dt_lr} | dict.fromkeys(("log_A_real", "A_imag", "P", "B"), self.ssm_lr)
        return {f"*.{name}": {"lr": rate, "weight_decay": 0.0} for name, rate in rates.items()}
