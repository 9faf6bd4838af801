"""Diagonal state space models (S4D, arXiv:2206.11893): initial modes, discretisation, kernel and recurrence.

Of each conjugate pair of modes one is kept: M = N / 2 complex modes a channel, and every sum over them is 2 Re.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lra.architectures._checks import one_of
from lra.architectures._hippo import legs_modes
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.kernels.ssm_kernel_diag import ssm_kernel_diag

INITS = ("lin", "inv", "legs", "real", "diag")
DISCRETIZATIONS = ("zoh", "bilinear")


def modes(init: str, state_size: int) -> tuple[Tensor, Tensor]:
    """A (complex128) and B (float64), each (N / 2,), as section 4 of the paper initialises them. init: one of INITS
    but "diag", which mixes two of them."""
    n = torch.arange(state_size // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    if init == "lin":
        return torch.complex(half, math.pi * n), torch.ones_like(n)
    if init == "inv":
        return torch.complex(half, state_size / math.pi * (state_size / (2 * n + 1) - 1)), torch.ones_like(n)
    if init == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n)), torch.ones_like(n)
    frequency, basis, b = legs_modes(state_size)
    kept = slice(state_size // 2, None)  # the frequencies above 0
    return torch.complex(half, frequency[kept]), (basis.mH @ b.to(basis.dtype)).abs()[kept] / 2


def check_diagonal(state_size: int, init: str, discretization: str, n_ssm: int) -> None:
    """Raises ValueError for arguments that no `DiagonalSSM` has."""
    if state_size < 2 or state_size % 2:
        raise ValueError(f"state_size is {state_size}; an even number of at least 2, conjugate modes come in pairs")
    one_of(INITS, init=init)
    if init == "diag" and n_ssm % 2:
        raise ValueError(f"n_ssm is {n_ssm}; an even number, half of the state matrices start as inv and half as lin")
    one_of(DISCRETIZATIONS, discretization=discretization)


class DiagonalSSM(nn.Module):
    """`width` channels, each with a diagonal state space model of M modes and a step size dt = exp(log_dt).

    n_ssm: independent (A, B), channel h taking number h mod n_ssm. ways: output vectors C for each channel, of which
    the second looks ahead.
    """

    def __init__(
        self, width: int, *, state_size: int, init: str, discretization: str, dt_min: float, dt_max: float, n_ssm: int,
        ways: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.discretization = discretization
        halves = [modes(name, state_size) for name in (("inv", "lin") if init == "diag" else (init,))]
        A, B = (torch.stack(parts).repeat_interleave(n_ssm // len(halves), 0) for parts in zip(*halves, strict=True))
        self.log_dt = nn.Parameter(initial_log_dt(width, dt_min, dt_max))
        self.log_A_real = nn.Parameter((-A.real).log().float())
        self.A_imag = nn.Parameter(A.imag.float())
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.B = nn.Parameter(torch.stack([B, torch.zeros_like(B)], dim=-1).float())
        self.C = nn.Parameter(torch.randn(ways, width, state_size // 2, 2) * 0.5**0.5)

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """A: (H, M), C B: (ways, H, M), dt: (H,)."""
        tiles = len(self.log_dt) // len(self.A_imag)
        A = torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag)).repeat(tiles, 1)
        B = torch.view_as_complex(wide(self.B)).repeat(tiles, 1)
        return A, torch.view_as_complex(wide(self.C)) * B, wide(self.log_dt).exp()

    def kernel(self, length: int) -> Tensor:
        """K: (ways, H, length)."""
        return ssm_kernel_diag(*self._continuous(), length, self.discretization)

    def start(self, *batch: int) -> Tensor:
        """The state before the first token: (*batch, H, M) complex zeros."""
        return torch.zeros(*batch, *self.C.shape[1:3], dtype=wide(self.C).dtype.to_complex(), device=self.C.device)

    def advance(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token: u (..., H), state (..., H, M) -> 2 Re C x (..., H) and the next state. In double precision:
        rounding Abar would grow with time."""
        A, C, dt = self._continuous()
        decay, enter = self.discrete(A, dt)
        state = (decay * state + enter * u.unsqueeze(-1)).to(state.dtype)
        return 2 * (C[0] * state).sum(-1).real.to(u.dtype), state

    def discrete(self, A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Abar, and Bbar / B: (H, M) complex128."""
        z = (dt.unsqueeze(-1) * A).to(torch.complex128)
        if self.discretization == "zoh":
            return z.exp(), torch.expm1(z) / A
        return (1 + z / 2) / (1 - z / 2), dt.unsqueeze(-1) / (1 - z / 2)
