"""State space models whose matrix is diagonal minus low rank (S4, arXiv:2111.00396): initial modes and kernel.

Of each conjugate pair of modes one is kept: M = N / 2 complex modes a channel, and P^* x over all of them is
2 Re(P^H x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lra.architectures._hippo import legs_modes, legt
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.encoder import Cost
from lra.kernels.ssm_kernel_dplr import ssm_kernel_dplr
from lra.kernels.ssm_kernel_dplr.transform import transformed_output

INITS = ("legs", "fout", "legt", "hippo")


def modes(init: str, state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A: (N / 2,), P: (rank, N / 2) and B: (N / 2,), complex128: HiPPO in the basis that makes it diagonal minus
    P P^*. init: one of INITS but "hippo", which mixes two of them."""
    n, above = torch.arange(state_size // 2, dtype=torch.float64), slice(state_size // 2, None)  # frequencies above 0
    if init == "fout":
        B = torch.where(n == 0, 0.5, torch.ones_like(n)).sqrt().to(torch.complex128)
        return torch.complex(torch.zeros_like(n), math.pi * n), B.unsqueeze(0), B
    if init == "legs":
        frequency, basis, b = legs_modes(state_size)
        B = (basis.mH @ b.to(basis.dtype))[above]
        return torch.complex(torch.full_like(n, -0.5), frequency[above]), B.unsqueeze(0) * 0.5**0.5, B
    dense, b, p = legt(state_size)
    frequency, basis = torch.linalg.eigh(-1j * (dense + p.mT @ p))
    turned = torch.cat([p, b.unsqueeze(0)]).to(basis.dtype) @ basis.conj()[:, above]
    return torch.complex(torch.zeros_like(n), frequency[above]), turned[:-1], turned[-1]


def check_dplr(state_size: int, init: str, n_ssm: int) -> None:
    """Raises ValueError for arguments that no `DPLRSSM` has."""
    if state_size < 2 or state_size % 2:
        raise ValueError(f"state_size is {state_size}; an even number of at least 2, conjugate modes come in pairs")
    if init not in INITS:
        raise ValueError(f"init is {init!r}; one of {', '.join(INITS)}")
    if init == "hippo" and n_ssm % 2:
        raise ValueError(f"n_ssm is {n_ssm}; an even number, half of the state matrices start as legs and half as fout")


class DPLRSSM(nn.Module):
    """`width` channels, each with a state space model of M modes and a step size dt = exp(log_dt).

    n_ssm: independent (A, P, B), channel h taking number h mod n_ssm. ways: output vectors for each channel, of which
    the second looks ahead. The parameter is Ct = C (I - Abar^length).
    """

    def __init__(
        self, width: int, *, length: int, state_size: int, init: str, dt_min: float, dt_max: float, n_ssm: int,
        ways: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length = length
        halves = [modes(name, state_size) for name in (("legs", "fout") if init == "hippo" else (init,))]
        A, P, B = (
            torch.stack(parts, dim=-2).repeat_interleave(n_ssm // len(halves), -2)
            for parts in zip(*halves, strict=True)
        )
        self.log_dt = nn.Parameter(initial_log_dt(width, dt_min, dt_max))
        self.log_A_real = nn.Parameter((-A.real).clamp_min(1e-4).log().float())
        self.A_imag = nn.Parameter(A.imag.float())
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.P = nn.Parameter(torch.view_as_real(P.resolve_conj()).float())  # (rank, n_ssm, M, 2)
        self.B = nn.Parameter(torch.view_as_real(B.resolve_conj()).float())
        self.C_tilde = nn.Parameter(torch.empty(ways, width, state_size // 2, 2))
        self.set_output(torch.randn(ways, width, state_size // 2, dtype=torch.complex64))

    @torch.no_grad()
    def set_output(self, C: Tensor) -> None:
        """Let the output vectors be C: (ways, H, M) complex, with the modes and steps as they are now."""
        A, P, _, dt = self._continuous()
        self.C_tilde.copy_(torch.view_as_real(transformed_output(A, P, C, dt, self.length)))

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A: (H, M), P: (rank, H, M), B: (H, M), dt: (H,)."""
        tiles = len(self.log_dt) // len(self.A_imag)
        A = torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag)).repeat(tiles, 1)
        P, B = (torch.view_as_complex(wide(part)) for part in (self.P, self.B))
        return A, P.repeat(1, tiles, 1), B.repeat(tiles, 1), wide(self.log_dt).exp()

    def kernel(self, length: int) -> Tensor:
        """K: (ways, H, length)."""
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} steps the parameter of this S4 stands for")
        A, P, B, dt = self._continuous()
        C = torch.view_as_complex(wide(self.C_tilde))
        return ssm_kernel_dplr(A, P, B, C, dt, self.length, transformed=True)[..., :length]

    def convolution_cost(self, length: int) -> Cost:
        """Work of the convolution for one sequence, and of the kernel for a batch."""
        kernels, width, modes, _ = self.C_tilde.shape
        rank, taps = len(self.P), max(length, self.length)
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        # at half of the roots two reciprocals a mode, and Cauchy sums of each P and each C with each P and B
        cauchy = modes * (taps / 2 + 1) * (18.0 + 8.0 * (kernels + rank) * (1 + rank))
        kernel = width * (cauchy + kernels * (2.5 * taps * math.log2(2 * taps) + transform))
        return Cost(other=width * (2 * transform + 6 * length), batch_other=kernel)

    def output(self) -> Tensor:
        """C: (ways, H, M) complex128, which takes a solve of 2M equations a channel to get back from Ct."""
        A, P, _, dt = self._continuous()
        width, modes = A.shape
        eye = torch.eye(2 * modes, dtype=torch.float64, device=dt.device)
        rows = torch.complex(eye[:, :modes], -eye[:, modes:]).unsqueeze(1).expand(-1, width, -1)
        turned = transformed_output(A, P, rows, dt, self.length).transpose(0, 1)
        matrix = torch.cat([turned.real, -turned.imag], dim=-1)
        C = torch.view_as_complex(wide(self.C_tilde)).to(torch.complex128)
        given = torch.cat([C.real, -C.imag], dim=-1)
        left, right = torch.linalg.solve(matrix, given.unsqueeze(-2), left=False).squeeze(-2).chunk(2, dim=-1)
        return torch.complex(left, -right)
