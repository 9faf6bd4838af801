"""H3: a shift state space model stores keys, a diagonal one stores their products with values, and queries read them.

Fu, Dao, Saab, Thomas, Rudra and Re 2022, arXiv:2212.14052. With head_dim = d channels a head and H = D / d heads:

    q = W_q x + b_q,  k = W_k x + b_k,  v = W_v x + b_v          (B, L, D)   H heads of d channels
    k'_t = sum_{j < N} s_j k_{t-j} + ssm_k_D k_t                 (B, L, D)   shift SSM, N taps a channel
    z_t = SSM(k' v^T)_t + D k'_t v_t^T                           (B, L, H, d, d)   diagonal SSM, one a head
    o_t = q_t^T z_t                                              (B, L, H, d)
    out = W_o o + b_o                                            (B, L, D)   channels of o ordered (d, H)

Shift SSM: its matrix moves the state down by one, so that tap s_j = sum_i C_{i+j} B_i (section 3.1). Diagonal SSM: that
of S4D, of each conjugate pair of modes one kept, M = N / 2 complex modes a head:

    zoh         Abar = exp(dt A),                          Bbar = (Abar - 1) / A B
    bilinear    Abar = (1 + dt A / 2) / (1 - dt A / 2),    Bbar = dt / (1 - dt A / 2) B
    s_t = Abar s_{t-1} + Bbar u_t,   SSM(u)_t = 2 Re C s_t

Initialisation, as released: shift_B = e_1, so that the state holds the last N keys; shift_C uniform within N^-1/2, as
PyTorch starts a convolution of N taps; A = -1/2 + i pi n and B = 1 (S4D-Lin), C complex, D and ssm_k_D standard
normal; log_dt uniform between log dt_min and log dt_max; the linear maps PyTorch's own. The two B, A and dt learn at
`ssm_lr` at most and without weight decay.

Departures: the paper keeps B of the shift SSM at e_1; as in the released code, it is learnt from there. The code
multiplies C of the diagonal SSM by B at the start and again in the kernel; as B starts at 1 this changes nothing.

Checked against: tensors of the authors' H3 (one channel a head with zero-order hold, two with the bilinear rule), both
kernels, outputs and gradient of x; gradients of every parameter against the recurrence step by step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._diagonal import DiagonalSSM, check_diagonal
from lra.architectures._dropout import Dropout
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.causal_conv1d import causal_conv1d
from lra.kernels.fft_conv import fft_conv

State = tuple[Tensor, Tensor]


class H3Mixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, state_size: int, head_dim: int, init: str, discretization: str, dt_min: float,
        dt_max: float, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim, self.n_heads = head_dim, d_model // head_dim
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.shift_B = nn.Parameter(F.pad(torch.ones(d_model, 1), (0, state_size - 1)))
        self.shift_C = nn.Parameter(torch.empty(d_model, state_size).uniform_(-(state_size**-0.5), state_size**-0.5))
        self.ssm_k_D = nn.Parameter(torch.randn(d_model))
        self.diag = DiagonalSSM(
            self.n_heads,
            state_size=state_size,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            n_ssm=self.n_heads,
        )
        self.D = nn.Parameter(torch.randn(self.n_heads))
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def shift_kernel(self) -> Tensor:
        """(D, N), tap j on the token j steps back."""
        size = self.shift_B.shape[1]
        shifted = F.pad(self.shift_C, (0, size - 1)).unfold(1, size, 1)  # (D, j, i): C_{i+j}
        return (shifted * self.shift_B.unsqueeze(1)).sum(-1)

    def _taps(self) -> Tensor:
        """The shift kernel and its skip, (D, N), oldest token first."""
        kernel = self.shift_kernel()
        return torch.cat([kernel[:, :1] + self.ssm_k_D.unsqueeze(1), kernel[:, 1:]], dim=1).flip(1)

    def _heads(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H, d)."""
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def _read(self, q: Tensor, z: Tensor) -> Tensor:
        """q: (..., D), z: (..., d, d, H), keys before values -> (..., D)."""
        o = (self._heads(q).mT.unsqueeze(-2) * z).sum(-3)
        return self.output_linear(self.dropout(o.flatten(-2)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        k = self._heads(causal_conv1d(self.k_proj(x), self._taps()))
        kv = k.unsqueeze(-1) * self._heads(self.v_proj(x)).unsqueeze(-2)  # (B, L, H, d, d)
        pairs = kv.permute(0, 3, 4, 1, 2)  # one kernel a head: the pairs (d, d) join the batch
        z = fft_conv(pairs.flatten(0, 2), self.diag.kernel(x.shape[1])[0], self.D)
        return self._read(self.q_proj(x), z.unflatten(0, pairs.shape[:3]).permute(0, 3, 1, 2, 4))

    def cost(self, length: int) -> Cost:
        (width, size), (heads, modes) = self.shift_B.shape, self.diag.C.shape[1:3]
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        pairs = width * self.head_dim
        spectral = pairs * (2 * transform + 6 * length)
        kernel = heads * (transform + 4.0 * modes * length)
        other = spectral + 2.0 * width * size * (length + size) + 4.0 * pairs * length
        return 4 * Cost.linear(length, width, width) + Cost(other=other, batch_other=kernel)

    def init_state(self, batch: int) -> State:
        window = self.shift_B.new_zeros(batch, self.shift_B.shape[1] - 1, len(self.shift_B))
        return window, self.diag.start(batch, self.head_dim, self.head_dim)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last N - 1 keys (B, N - 1, D), and s (B, d, d, H, M) complex."""
        window = torch.cat([state[0], self.k_proj(x).unsqueeze(1)], dim=1)
        k = self._heads(torch.einsum("bnc,cn->bc", window, self._taps()))
        kv = (k.unsqueeze(-1) * self._heads(self.v_proj(x)).unsqueeze(-2)).permute(0, 2, 3, 1)
        z, s = self.diag.advance(kv, state[1])
        return self._read(self.q_proj(x), z + self.D * kv), (window[:, 1:], s)


class H3(Stack):
    """state_size: N, even, of both state space models. head_dim: channels a head, a divisor of d_model; a head holds
    head_dim^2 products. init: lin, inv, legs, real or diag. discretization: zoh or bilinear. dt_min, dt_max: range of
    the initial step sizes. ssm_lr: highest learning rate of A, B and dt."""

    card = Card(
        title="Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
        year=2022,
        url="https://arxiv.org/abs/2212.14052",
        scaling="L log L",
        causal=True,
        variants={"multihead": {"head_dim": 8}},
        exempt={"optim_norms": "the released optimiser, that of S4, spares the kernel's own parameters alone"},
    )

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        state_size: int = 64,
        head_dim: int = 1,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        ssm_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"head_dim is {head_dim}; a divisor of d_model, {d_model}")
        check_diagonal(state_size, init, discretization, d_model // head_dim)
        self.ssm_lr = ssm_lr
        super().__init__(
            lambda _: H3Mixer(
                d_model, state_size=state_size, head_dim=head_dim, init=init, discretization=discretization,
                dt_min=dt_min, dt_max=dt_max, dropout=dropout,
            ),
            d_model=d_model, dropout=dropout, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        names = ("log_dt", "log_A_real", "A_imag", "B", "shift_B")
        return {f"*.{name}": {"lr": self.ssm_lr, "weight_decay": 0.0} for name in names}
