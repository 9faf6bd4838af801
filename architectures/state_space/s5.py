"""S5: one state space model from all channels to all channels, diagonal and run as a scan.

Smith, Warrington and Linderman 2022, arXiv:2208.04933. `state_size` counts real dimensions; of each conjugate pair of
modes one is kept: P = state_size / 2 complex modes, and every sum over them is 2 Re. Per token, with a step size
dt = exp(log_step) for each mode and A = Lambda_re + i Lambda_im:

    zoh         Abar = exp(dt A),                        Bbar = (Abar - 1) / A B        section 2.1
    bilinear    Abar = (1 + dt A / 2) / (1 - dt A / 2),  Bbar = dt / (1 - dt A / 2) B
    s_t = Abar s_{t-1} + Bbar x_t,   s_0 = 0               (B, L, P)   A (P,), B complex (P, D)
    y_t = 2 Re(C s_t) + D x_t                              (B, L, D)   C complex (D, P), D (D,)
    out = g sigmoid(out2 g),   g = gelu(y)                 (B, L, D)   half_glu1, tanh form of GELU; appendix G.1
          y sigmoid(out2 g)                                            half_glu2

Bidirectional: a second scan of the same Bbar x runs backwards and is read by a C of its own; both include x_t.

Initialisation (section 3.4, appendix B.1): A = n_blocks copies of the eigenvalues of the normal part of HiPPO-LegS of
size state_size / n_blocks, with eigenvectors V; B = V* B' with B' real and normal of variance 1 / state_size; D
standard normal; log_step uniform between log dt_min and log dt_max for each mode; out2 PyTorch's own. A, B and dt learn
at `ssm_lr` at most and without weight decay. C has one of the three forms released, by the names they have there:
    trunc_standard_normal   C = C' V, both parts of C' normal of variance 1 / state_size
    lecun_normal            C = C' V, both parts of C' normal of variance 1 / (D state_size)
    complex_normal          both parts of C itself normal of variance 1 / 2
The released runs take the second for ListOps, Text and Image, the third for Path-X, the first for the others.

Departures: normal draws where JAX cuts tails off at two deviations; layer norm unless the recipe says otherwise, not
batch norm, whose statistics depend on the rest of the batch. Of each pair the mode of negative frequency is kept, as in
the released code.

Checked against: tensors of the authors' S5SSM (both discretisations, both directions, clipped eigenvalues, modes
without conjugates) and SequenceLayer, with gradients of x; parameter gradients against the recurrence step by step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import one_of
from lra.architectures._dropout import Dropout
from lra.architectures._hippo import legs_modes
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan

DISCRETIZATIONS = ("zoh", "bilinear")
ACTIVATIONS = ("half_glu1", "half_glu2")
C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")
OPT_CONFIGS = ("standard", "BandCdecay", "BfastandCdecay")


def output_matrix(c_init: str, d_model: int, n_blocks: int, basis: Tensor, ways: int) -> Tensor:
    """C: (ways, D, P) complex128; basis: V of one block, (size, size / 2)."""
    if c_init == "complex_normal":
        # a complex draw of variance 1, whose parts have half of it
        return torch.randn(ways, d_model, n_blocks * basis.shape[1], dtype=torch.complex128)
    state_size = n_blocks * len(basis)
    variance = 1 / (state_size if c_init == "trunc_standard_normal" else d_model * state_size)
    C = torch.randn(ways, d_model, n_blocks, len(basis), 2, dtype=torch.float64) * math.sqrt(variance)
    return (torch.view_as_complex(C) @ basis).flatten(2)


def hippo_block(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (size / 2,) of the normal part of HiPPO-LegS with negative imaginary part, ascending, and their
    eigenvectors (size, size / 2): complex128."""
    frequency, basis, _ = legs_modes(size)
    kept = slice(size // 2)  # the frequencies below 0
    return torch.complex(torch.full_like(frequency[kept], -0.5), frequency[kept]), basis[:, kept]


class S5Mixer(Mixer):
    """(B, L, D) -> (B, L, D). The padding is zero, so the backward scan reaches the last real token with no state."""

    def __init__(
        self, d_model: int, *, state_size: int, n_blocks: int, discretization: str, dt_min: float, dt_max: float,
        clip_eigs: bool, activation: str, causal: bool, dropout: float, c_init: str = C_INITS[0],
    ) -> None:  # fmt: skip
        super().__init__()
        self.discretization, self.clip_eigs, self.activation = discretization, clip_eigs, activation
        modes, basis = hippo_block(state_size // n_blocks)
        B = torch.randn(n_blocks, len(basis), d_model, dtype=torch.float64) / math.sqrt(state_size)
        B = (basis.mH @ B.to(basis.dtype)).flatten(0, 1)
        C = output_matrix(c_init, d_model, n_blocks, basis, 1 if causal else 2)
        self.Lambda_re = nn.Parameter(modes.real.float().repeat(n_blocks))
        self.Lambda_im = nn.Parameter(modes.imag.float().repeat(n_blocks))
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.B = nn.Parameter(torch.view_as_real(B).float())  # (P, D, 2)
        self.C = nn.Parameter(torch.view_as_real(C).float())  # (1 or 2, D, P, 2); the second reads the backward scan
        self.D = nn.Parameter(torch.randn(d_model))
        self.log_step = nn.Parameter(initial_log_dt(len(B), dt_min, dt_max))
        self.out2 = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Abar: (P,), Bbar: (P, D), complex."""
        real = self.Lambda_re.clamp(max=-1e-4) if self.clip_eigs else self.Lambda_re
        A, dt = torch.complex(wide(real), wide(self.Lambda_im)), wide(self.log_step).exp()
        if self.discretization == "zoh":
            A_bar, B_bar = torch.exp(dt * A), torch.expm1(dt * A) / A
        else:
            A_bar, B_bar = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
        return A_bar, B_bar.unsqueeze(1) * torch.view_as_complex(wide(self.B))

    def _inputs(self, x: Tensor, B_bar: Tensor) -> Tensor:
        """Bbar x: (..., D) -> (..., P) complex, as one real product."""
        pairs = F.linear(x, torch.view_as_real(B_bar).transpose(1, 2).flatten(0, 1))
        return torch.view_as_complex(wide(pairs).unflatten(-1, (-1, 2)))

    def _outputs(self, states: list[Tensor], x: Tensor) -> Tensor:
        """2 Re(C s) + D x: one (..., P) for each direction -> (..., D)."""
        real, imaginary = self.C.unbind(-1)
        C = 2 * torch.stack([real, -imaginary], dim=-1)  # (1 or 2, D, P, 2)
        s = torch.cat([torch.view_as_real(s).flatten(-2) for s in states], dim=-1)
        return F.linear(s, C.flatten(2).transpose(0, 1).flatten(1)) + self.D * x

    def _activate(self, y: Tensor) -> Tensor:
        g = self.dropout(F.gelu(y, approximate="tanh"))
        return (g if self.activation == "half_glu1" else y) * torch.sigmoid(self.out2(g))

    def ssm(self, x: Tensor) -> Tensor:
        """y of the equations: (B, L, D) -> (B, L, D)."""
        A_bar, B_bar = self.discrete()
        inputs = self._inputs(x, B_bar)
        ways = [False, True][: len(self.C)]
        return self._outputs([linear_scan(A_bar[None, None], inputs, reverse=way) for way in ways], x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._activate(self.ssm(x))

    def cost(self, length: int) -> Cost:
        ways, width, modes, _ = self.C.shape
        maps = Cost.linear(length, width, 2 * modes, bias=False) + Cost.linear(length, 2 * ways * modes, width, False)
        return maps + Cost.linear(length, width, width) + Cost(other=length * (8.0 * ways * modes + 18.0 * width))

    def init_state(self, batch: int) -> Tensor:
        real = self.Lambda_re
        return torch.zeros(batch, len(real), dtype=real.dtype.to_complex(), device=real.device)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: s (B, P) complex."""
        A_bar, B_bar = self.discrete()
        state = A_bar * state + self._inputs(x, B_bar)
        return self._activate(self._outputs([state], x)), state

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A_bar, B_bar = self.discrete()
        s = linear_scan(A_bar[None, None], self._inputs(x, B_bar), state)
        return self._activate(self._outputs([s], x)), s[:, -1]


class S5(Stack):
    """state_size: real dimensions of the state, in n_blocks blocks of even size. discretization: of DISCRETIZATIONS.
    dt_min, dt_max: range of the initial step sizes. clip_eigs: hold Re A at -1e-4 or below, so that training cannot
    make it unstable. activation: of ACTIVATIONS. c_init: how C starts, of C_INITS. ssm_lr: highest learning
    rate of A, B and dt. opt_config, dt_global: as in the released code, of OPT_CONFIGS: "BandCdecay" decays B,
    "BfastandCdecay" also trains it at the base rate; dt_global trains dt at the base rate and decays it."""

    card = Card(
        title="Simplified State Space Layers for Sequence Modeling",
        year=2022,
        url="https://arxiv.org/abs/2208.04933",
        scaling="L",
        causal=True,
        exempt={"optim_norms": "the authors' optimiser spares A, B and dt alone"},
        variants={"bilinear": {"discretization": "bilinear"}},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 64,
        n_blocks: int = 8,
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        clip_eigs: bool = False,
        activation: str = "half_glu1",
        c_init: str = "trunc_standard_normal",
        ssm_lr: float = 0.001,
        opt_config: str = "standard",
        dt_global: bool = False,
        **stack: Any,
    ) -> None:
        if n_blocks < 1 or state_size < 2 * n_blocks or state_size % (2 * n_blocks):
            raise ValueError(f"state_size is {state_size}; a multiple of 2 n_blocks = {2 * n_blocks}, as modes pair")
        one_of(DISCRETIZATIONS, discretization=discretization)
        one_of(ACTIVATIONS, activation=activation)
        one_of(C_INITS, c_init=c_init)
        one_of(OPT_CONFIGS, opt_config=opt_config)
        self.ssm_lr, self.opt_config, self.dt_global = ssm_lr, opt_config, dt_global
        super().__init__(
            lambda _: S5Mixer(
                d_model, state_size=state_size, n_blocks=n_blocks, discretization=discretization, dt_min=dt_min,
                dt_max=dt_max, clip_eigs=clip_eigs, activation=activation, causal=direction == "causal",
                dropout=dropout, c_init=c_init,
            ),
            native=True, d_model=d_model, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        settings = {f"*.{name}": {"lr": self.ssm_lr, "weight_decay": 0.0} for name in ("Lambda_re", "Lambda_im")}
        if self.opt_config != "BfastandCdecay":
            undecayed = {} if self.opt_config == "BandCdecay" else {"weight_decay": 0.0}
            settings["*.B"] = {"lr": self.ssm_lr} | undecayed
        if not self.dt_global:
            settings["*.log_step"] = {"lr": self.ssm_lr, "weight_decay": 0.0}
        return settings
