"""Implementations of the operators in PyTorch and in other installed packages, for `python -m benchmarks operators`."""

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
    """Other implementations of `op` for these arguments. own: our implementation that they are compared with."""
    if op in PEERS:
        yield from PEERS[op](arguments, own)


def installed(package: str, tensor: Tensor | None = None) -> bool:
    """Whether a package or module is installed. tensor: an argument, for packages that only run on CUDA tensors."""
    try:
        exists = find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
    return exists and (tensor is None or tensor.is_cuda)


def _linear_scan(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    a, b = arguments["a"], arguments["b"]
    yield Contender("torch.add of a and b", lambda a, b: a + b, {"a": a.expand_as(b), "b": b}, backward=False)
    if a.is_complex():
        if installed("s5"):
            scan, combine = (
                import_module("s5.jax_compat").associative_scan,
                import_module("s5.s5_model").binary_operator,
            )
            yield Contender("s5-pytorch", lambda a, b, **_: scan(combine, (a, b), axis=1)[1], arguments)
        return
    if installed("mambapy"):
        pscan = import_module("mambapy.pscan").pscan
        # takes (B, L, D, N) and writes into its arguments
        yield Contender(
            "mambapy", lambda a, b, **_: pscan(a.unsqueeze(-1).clone(), b.unsqueeze(-1).clone()).squeeze(-1), arguments
        )
    if installed("minGRU_pytorch"):
        scan = import_module("minGRU_pytorch.minGRU").heinsen_associative_scan_log
        positive = arguments | {"a": a.log(), "b": b.abs().log()}
        yield Contender("minGRU-pytorch, logarithms of |b|", lambda a, b, **_: scan(a, b), positive)


def _selective_scan(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    if installed("mambapy"):
        pscan = import_module("mambapy.pscan").pscan

        def mambapy(
            u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None
        ) -> Tensor:
            h = pscan(torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2))
            y = (h @ C.unsqueeze(-1)).squeeze(-1)
            y = y if D is None else y + D * u
            return y if z is None else y * F.silu(z)

        yield Contender("mambapy", mambapy, arguments)
    if installed("mamba_ssm", arguments["u"]):
        fused = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

        def mamba_ssm(
            u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None
        ) -> Tensor:
            z = None if z is None else z.mT
            return fused(u.mT, delta.mT, A, B.mT, C.mT, D, z).mT

        yield Contender("mamba-ssm", mamba_ssm, arguments)


def _ssd(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    if installed("mamba_ssm", arguments["x"]):
        scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        yield Contender("mamba-ssm", lambda x, dt, A, B, C, **_: scan(x, dt, A, B, C, 64), arguments)


def _decay_attention(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    decay = arguments["log_decay"]
    if not installed("fla", decay) or decay.ndim < 3:
        return
    attend = import_module("fla.ops.gla").chunk_gla if decay.ndim == 4 else None
    attend = attend or import_module("fla.ops.simple_gla").chunk_simple_gla
    yield Contender("fla", lambda q, k, v, log_decay, **_: attend(q, k, v, g=log_decay, scale=1.0)[0], arguments)


def _delta_rule(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    if not installed("fla", arguments["q"]):
        return
    if arguments.get("log_decay") is None:
        rule = import_module("fla.ops.delta_rule").chunk_delta_rule
        yield Contender("fla", lambda q, k, v, beta, **_: rule(q, k, v, beta, scale=1.0)[0], arguments)
    else:
        gated = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        yield Contender(
            "fla", lambda q, k, v, beta, log_decay, **_: gated(q, k, v, log_decay, beta, scale=1.0)[0], arguments
        )


def _causal_conv1d(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=len(weight))
        y = y[..., : x.shape[1]].mT
        return y if activation is None else F.silu(y)

    yield Contender("torch conv1d", convolve, arguments)


def _band_attention(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    q, k, v, window = (arguments[name] for name in ("q", "k", "v", "window"))
    if not isinstance(window, int) or arguments.get("mask") is not None:
        return
    position = torch.arange(q.shape[1], device=q.device)
    mask = (position - position.unsqueeze(1)).abs() <= window

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    yield Contender("torch masked attention", attend, {"q": q, "k": k, "v": v})


def _recurrent_cell(arguments: dict[str, Any], own: str) -> Iterator[Contender]:
    """Layers of torch include the input projection, so ours is also timed with it. Cells that torch lacks are compared
    with a loop over time."""
    x, U, cell = arguments["x_gates"], arguments["U"], arguments["cell"]
    if installed("flashrnn", x) and cell in ("lstm", "gru", "elman"):
        fused = import_module("flashrnn").flashrnn
        gates, size = len(U) // U.shape[1], U.shape[1]

        def flashrnn(x_gates: Tensor, U: Tensor, b: Tensor, **_: Any) -> Tensor:
            """Without the input projection, as ours; one head."""
            states, _last = fused(
                x_gates.unflatten(2, (gates, 1, size)), U.view(gates, 1, size, size), b.view(gates, 1, size),
                function=cell, backend="cuda_fused",
            )  # fmt: skip
            return states[0].squeeze(2)

        yield Contender("flashrnn", flashrnn, arguments)
    if cell not in TORCH_LAYERS:
        yield Contender("loop over time", loop_over_time, arguments)
        return
    layer, width = TORCH_LAYERS[cell], U.shape[1]
    b = arguments["b"]
    with_input = {"x": x[..., :width].contiguous(), "w": torch.rand_like(U) / width, "U": U, "b": b}
    zero = x.new_zeros(1, len(x), width)
    start = [zero, zero] if cell == "lstm" else zero

    def in_torch(x: Tensor, w: Tensor, U: Tensor, b: Tensor) -> Tensor:
        return layer(x, start, [w, U, torch.zeros_like(b), b], True, 1, 0.0, True, False, True)[0]

    def ours(x: Tensor, w: Tensor, U: Tensor, b: Tensor) -> Any:
        return recurrent_cell(F.linear(x, w), U, b, cell, impl=own)

    yield Contender(f"{own} with input projection", ours, with_input)
    yield Contender("torch.nn layer", in_torch, with_input)


PEERS: dict[str, Callable[[dict[str, Any], str], Iterator[Contender]]] = {
    "linear_scan": _linear_scan,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "decay_attention": _decay_attention,
    "delta_rule": _delta_rule,
    "causal_conv1d": _causal_conv1d,
    "band_attention": _band_attention,
    "recurrent_cell": _recurrent_cell,
}
