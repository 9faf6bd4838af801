"""`fft_conv` against direct convolution at full length, and what only it promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.kernels.fft_conv import cpu, fft_conv

IMPLEMENTATIONS = ["reference", "cpu"]


def relative(found: Tensor, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found.numpy() - wanted) ** 2) / np.mean(wanted**2)))


def test_as_long_a_kernel_as_sequence() -> None:
    """All 16,384 taps in float32, against NumPy's direct sums in float64: output and gradients of u and k."""
    length = 16384
    rng = np.random.default_rng(0)
    given = rng.standard_normal((4, length)).astype(np.float32)
    x = torch.from_numpy(given[0])[None, :, None].requires_grad_()
    k = torch.from_numpy(given[1:3])[:, None].requires_grad_()
    y = fft_conv(x, k, bidirectional=True)
    du, dk = torch.autograd.grad(y, (x, k), torch.from_numpy(given[3])[None, :, None])
    u, behind, ahead, g = (a.astype(np.float64) for a in given)
    both = np.concatenate([ahead[-2::-1], behind])  # offsets -(length - 1) .. length - 1
    assert relative(y.detach()[0, :, 0], np.convolve(u, both)[length - 1 : 2 * length - 1]) < 1e-5
    assert relative(du[0, :, 0], np.convolve(g, both[::-1])[length - 1 : 2 * length - 1]) < 1e-5
    lags = np.convolve(g, u[::-1])  # at index length - 1 + j: sum_t g_t u_{t - j}
    assert relative(dk[0, 0], lags[length - 1 :]) < 1e-5
    assert relative(dk[1, 0, :-1], lags[length - 2 :: -1]) < 1e-5
    assert dk[1, 0, -1] == 0  # reaches past the last step


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["longconv_causal_smooth", "longconv_bidirectional"])
def test_equals_safari_s_long_convolution(name: str, impl: str) -> None:
    """Two kernels a channel, each way where there are four; around it their GELU, map and gate."""
    g = golden(name)
    x, both = g["x"].requires_grad_(), "bidirectional" in name
    kernels = g["mid.kernel_squashed"].unflatten(0, (-1, 2)).transpose(0, 1)  # (2, directions, H, L)
    parts = [fft_conv(x, K if both else K[0], D, both, impl=impl) for K, D in zip(kernels, g["param.D"], strict=True)]
    y = F.linear(F.gelu(torch.cat(parts, dim=-1)), g["param.out.weight"], g["param.out.bias"])
    y = F.glu(y, dim=-1)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_each_tap_meets_its_step_and_nothing_wraps(impl: str) -> None:
    """An impulse at step 3 of 8: k0_j arrives at 3 + j; k1_j, which skips the current step, at 3 - 1 - j."""
    u = torch.zeros(1, 8, 1)
    u[0, 3] = 1
    k = torch.stack([torch.arange(1.0, 9.0), -torch.arange(1.0, 9.0)]).unsqueeze(1)
    wanted = torch.tensor([-3.0, -2, -1, 1, 2, 3, 4, 5])
    torch.testing.assert_close(fft_conv(u, k, bidirectional=True, impl=impl)[0, :, 0], wanted)
    torch.testing.assert_close(fft_conv(u, k[0], impl=impl)[0, :, 0], wanted.clamp(min=0))


def test_a_skip_counts_the_current_step() -> None:
    """Both directions with the current step (S5, MEGA): the first tap ahead becomes part of D."""
    torch.manual_seed(0)
    u, behind, ahead = torch.randn(2, 9, 3), torch.randn(3, 9), torch.randn(3, 9)
    both = fft_conv(u, behind) + fft_conv(u.flip(1), ahead).flip(1)
    k = torch.stack([behind, torch.nn.functional.pad(ahead[:, 1:], (0, 1))])
    torch.testing.assert_close(fft_conv(u, k, ahead[:, 0], bidirectional=True), both)


def smooth(number: int) -> bool:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


def test_fft_sizes_are_the_next_even_products_of_2_3_and_5() -> None:
    for least in [*range(1, 300), 32767, 32768, 32769, 99991]:
        wanted = least + least % 2
        while not smooth(wanted):
            wanted += 2
        assert cpu.fft_size(least) == wanted


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    u, k, D = given = [torch.randn(s, requires_grad=True) for s in ((2, 50, 3), (3, 50), (3,))]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        fft_conv(u, k, D)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in given}


class Largest(TorchDispatchMode):
    """The most numbers in any one tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_transforms_run_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 1 << 14)
    u, k = torch.randn(8, 500, 40), torch.randn(40, 500)
    wanted = fft_conv(u, k)
    body: Callable[..., Tensor] = cpu.convolve.__wrapped__._init_fn  # type: ignore[attr-defined]
    with Largest() as largest:
        found = body(u, k, None, False)
    torch.testing.assert_close(found, wanted)
    assert largest.numbers <= u.numel(), "more than the output was laid out at once"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.zeros(4, 5)}, r"k is \(4, 5\); expected \(H, K\) with H = 3"),
        ({"k": torch.zeros(3, 0)}, r"k is \(3, 0\); expected"),
        ({"k": torch.zeros(3, 3, 5), "bidirectional": True}, r"expected \(2, H, K\)"),
        ({"D": torch.zeros(2)}, r"D is \(2,\); expected \(3,\)"),
        ({"u": torch.zeros(2, 8, 3, dtype=torch.complex64)}, "u is torch.complex64; expected a real dtype"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"u": torch.zeros(2, 8, 3), "k": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=message):
        fft_conv(**(good | arguments))
