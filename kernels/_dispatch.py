"""Choice of the implementation of an operator. A fallback warns, and every choice is recorded.

    reference   the definition: a loop or a dense product, any dtype and device, differentiated by PyTorch
    cpu         the fast path for CPU tensors (plain torch or Numba); `portable` ones run on any device
    gpu         Triton, for CUDA tensors (and for CPU tensors under TRITON_INTERPRET=1)
    cudnn       NVIDIA's library, for CUDA tensors, where it has the operator

"auto" chooses the last of these that can run on the device of the tensors.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch

# Triton 3.10 would stop contracting a * b + c unless told to, and 3.9 warns of it at every kernel
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
IMPLEMENTATIONS = ("auto", "reference", "cpu", "gpu", "cudnn")
_used: dict[str, set[str]] = {}
_refused: dict[tuple[str, str], str] = {}
_warned: set[tuple[str, str]] = set()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run through its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse(op: str, implementation: str, reason: str) -> None:
    """Never choose this implementation in this process: it is missing or failed its parity check."""
    _refused[op, implementation] = reason


def refused() -> dict[tuple[str, str], str]:
    return dict(_refused)


def used() -> dict[str, list[str]]:
    """Operator -> implementations that ran since `forget_used`."""
    return {op: sorted(names) for op, names in sorted(_used.items())}


def forget_used() -> None:
    _used.clear()


# dynamo runs this once while tracing and keeps the answer, instead of tracing through it
@torch.compiler.assume_constant_result
def choose(
    op: str, impl: str, device: torch.device, *, portable: bool = False, has_gpu: bool = True, has_cudnn: bool = False
) -> str:
    """The implementation to run: "reference", "cpu", "gpu" or "cudnn". A fallback warns once; an explicit choice never
    falls back. `portable`: the cpu path is plain torch and runs on any device; `has_gpu`, `has_cudnn`: the operator has
    a Triton path, is in cuDNN.

    Raises ValueError where an explicit choice cannot run on `device`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    obstacle = {name: _obstacle(op, name, device, portable, has_gpu) for name in ("gpu", "cpu", "reference")}
    obstacle["cudnn"] = _cudnn_obstacle(op, device, has_cudnn)
    if impl != "auto":
        if obstacle[impl]:
            raise ValueError(f"{op}: impl={impl!r} cannot run: {obstacle[impl]}")
        chosen = impl
    else:
        # plain-torch paths are the fast ones on a GPU too where no kernel was written for the operator
        ours = "gpu" if device.type == "cuda" and (has_gpu or not portable) else "cpu"
        wanted = "cudnn" if device.type == "cuda" and has_cudnn else ours
        chosen = next(name for name in dict.fromkeys((wanted, ours, "cpu", "reference")) if not obstacle[name])
        if chosen != wanted and (op, chosen) not in _warned:
            _warned.add((op, chosen))
            warnings.warn(f"{op}: {chosen} path instead of {wanted}: {obstacle[wanted]}", RuntimeWarning, stacklevel=3)
    if device.type != "meta":  # counting FLOPs there runs nothing
        _used.setdefault(op, set()).add(chosen)
    return chosen


def _obstacle(op: str, name: str, device: torch.device, portable: bool, has_gpu: bool) -> str:
    if (op, name) in _refused:
        return _refused[op, name]
    if name == "gpu":
        if not has_gpu:
            return "it has no Triton kernel"
        if not has_triton():
            return "Triton is not installed"
        if device.type not in ("cuda", "meta") and not interpreting():
            return f"tensors are on {device.type}, a GPU kernel needs cuda"
    if name == "cpu" and not portable and device.type not in ("cpu", "meta"):
        return f"tensors are on {device.type}, the cpu path needs cpu"
    return ""


def _cudnn_obstacle(op: str, device: torch.device, has_cudnn: bool) -> str:
    if (op, "cudnn") in _refused:
        return _refused[op, "cudnn"]
    if not has_cudnn:
        return "cuDNN does not have it"
    if device.type != "cuda":
        return f"tensors are on {device.type}, cuDNN needs cuda"
    return "" if torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled else "cuDNN is not available"


def check(condition: bool, op: str, argument: str, got: object, expected: str) -> None:
    """Raise the ValueError every operator gives for a bad argument: operator, argument, got, expected."""
    if not condition:
        raise ValueError(f"{op}: {argument} is {got}; expected {expected}")


def check_tensors(op: str, **tensors: torch.Tensor | None) -> torch.device:
    """All given tensors on one device and floating or complex; their device. Raises ValueError."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, device = next((name, t.device) for name, t in given.items())
    for name, t in given.items():
        check(t.device == device, op, name, f"on {t.device}", f"{device}, where {first} is")
        check(t.is_floating_point() or t.is_complex(), op, name, t.dtype, "a floating-point or complex dtype")
    return device
