"""The operators' work done by PyTorch itself and by other packages, where they are installed: what
`python -m benchmarks operators` times beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.kernels.recurrent_cell import recurrent_cell
from lra.kernels.recurrent_cell.reference import reference as loop_over_time
from lra.operators.bench import Contender

TORCH_LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "elman": torch.rnn_tanh,
    "elman_relu": torch.rnn_relu,
}


def peers(op: str, arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    """Who else does what `op` does with these arguments; own: the implementation of ours they are compared with."""
    find = FINDERS.get(op)
    if find is not None:
        yield from find(arguments, own)


def installed(package: str, tensor: Tensor | None = None) -> bool:
    """Whether a package, or a module of one, is here; those that only run on CUDA tensors are asked for with one of the
    arguments."""
    try:
        found = find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False
    return found and (tensor is None or tensor.is_cuda)


def _linear_scan(given: dict[str, Any], own: str) -> Iterator[Contender]:
    a, b = given["a"], given["b"]
    yield Contender("torch.add of a and b", lambda a, b: a + b, {"a": a.expand_as(b), "b": b}, backward=False)
    if a.is_complex():
        if installed("s5"):
            scan, combine = (
                import_module("s5.jax_compat").associative_scan,
                import_module("s5.s5_model").binary_operator,
            )
            yield Contender("s5-pytorch", lambda a, b, **_: scan(combine, (a, b), axis=1)[1], given)
        return
    if installed("mambapy"):
        pscan = import_module("mambapy.pscan").pscan
        # (B, L, D, N) there; it writes into its arguments
        yield Contender(
            "mambapy", lambda a, b, **_: pscan(a.unsqueeze(-1).clone(), b.unsqueeze(-1).clone()).squeeze(-1), given
        )
    if installed("minGRU_pytorch"):
        scan = import_module("minGRU_pytorch.minGRU").heinsen_associative_scan_log
        positive = given | {"a": a.log(), "b": b.abs().log()}
        yield Contender("minGRU-pytorch, logarithms of |b|", lambda a, b, **_: scan(a, b), positive)


def _selective_scan(given: dict[str, Any], own: str) -> Iterator[Contender]:
    if installed("mambapy"):
        pscan = import_module("mambapy.pscan").pscan

        def mambapy(
            u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None
        ) -> Tensor:
            h = pscan(torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2))
            y = (h @ C.unsqueeze(-1)).squeeze(-1)
            y = y if D is None else y + D * u
            return y if z is None else y * F.silu(z)

        yield Contender("mambapy", mambapy, given)
    if installed("mamba_ssm", given["u"]):
        fused = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

        def mamba_ssm(
            u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None
        ) -> Tensor:
            z = None if z is None else z.mT
            return fused(u.mT, delta.mT, A, B.mT, C.mT, D, z).mT

        yield Contender("mamba-ssm", mamba_ssm, given)


def _ssd(given: dict[str, Any], own: str) -> Iterator[Contender]:
    if installed("mamba_ssm", given["x"]):
        scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        yield Contender("mamba-ssm", lambda x, dt, A, B, C, **_: scan(x, dt, A, B, C, 64), given)


def _decay_attention(given: dict[str, Any], own: str) -> Iterator[Contender]:
    decay = given["log_decay"]
    if not installed("fla", decay) or decay.ndim < 3:
        return
    attend = import_module("fla.ops.gla").chunk_gla if decay.ndim == 4 else None
    attend = attend or import_module("fla.ops.simple_gla").chunk_simple_gla
    yield Contender("fla", lambda q, k, v, log_decay, **_: attend(q, k, v, g=log_decay, scale=1.0)[0], given)


def _delta_rule(given: dict[str, Any], own: str) -> Iterator[Contender]:
    if not installed("fla", given["q"]):
        return
    if given.get("log_decay") is None:
        rule = import_module("fla.ops.delta_rule").chunk_delta_rule
        yield Contender("fla", lambda q, k, v, beta, **_: rule(q, k, v, beta, scale=1.0)[0], given)
    else:
        gated = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        yield Contender(
            "fla", lambda q, k, v, beta, log_decay, **_: gated(q, k, v, log_decay, beta, scale=1.0)[0], given
        )


def _causal_conv1d(given: dict[str, Any], own: str) -> Iterator[Contender]:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=len(weight))
        y = y[..., : x.shape[1]].mT
        return y if activation is None else F.silu(y)

    yield Contender("torch conv1d", convolve, given)


def _band_attention(given: dict[str, Any], own: str) -> Iterator[Contender]:
    q, k, v, window = (given[name] for name in ("q", "k", "v", "window"))
    if not isinstance(window, int) or given.get("mask") is not None:
        return
    position = torch.arange(q.shape[1], device=q.device)
    sees = (position - position.unsqueeze(1)).abs() <= window

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2)

    yield Contender("torch masked attention", attend, {"q": q, "k": k, "v": v})


def _recurrent_cell(given: dict[str, Any], own: str) -> Iterator[Contender]:
    """torch's layers include the product of the input, so ours is timed with it too. Where torch has no such layer:
    the loop that a user would write."""
    x, U, cell = given["x_gates"], given["U"], given["cell"]
    if cell not in TORCH_LAYERS:
        yield Contender("loop over time", loop_over_time, given)
        return
    layer, width = TORCH_LAYERS[cell], U.shape[1]
    b = given["b"]
    with_input = {"x": x[..., :width].contiguous(), "w": torch.rand_like(U) / width, "U": U, "b": b}
    zero = x.new_zeros(1, len(x), width)
    start = [zero, zero] if cell == "lstm" else zero

    def in_torch(x: Tensor, w: Tensor, U: Tensor, b: Tensor) -> Tensor:
        return layer(x, start, [w, U, torch.zeros_like(b), b], True, 1, 0.0, True, False, True)[0]

    def ours(x: Tensor, w: Tensor, U: Tensor, b: Tensor) -> Any:
        return recurrent_cell(F.linear(x, w), U, b, cell, impl=own)

    yield Contender(f"{own} with the input's product", ours, with_input)
    yield Contender("torch.nn layer", in_torch, with_input)


FINDERS: dict[str, Callable[[dict[str, Any], str], Iterator[Contender]]] = {
    "linear_scan": _linear_scan,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "decay_attention": _decay_attention,
    "delta_rule": _delta_rule,
    "causal_conv1d": _causal_conv1d,
    "band_attention": _band_attention,
    "recurrent_cell": _recurrent_cell,
}
