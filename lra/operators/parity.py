"""Parity: outputs and gradients of an operator compared with its reference in double precision, case by case."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lra.kernels._case import Case
from lra.operators import KERNELS, operators

__all__ = ["KERNELS", "arguments_of", "cases_of", "errors_of", "operator", "operators", "run"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest RMS(error) / RMS(reference), by dtype of the inputs. The reference gets the same, rounded inputs."""
BIAS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-4}
"""Largest `bias`. In bfloat16 the RMS of its own rounding hides operands that are cut off instead of rounded."""
CPU = torch.device("cpu")


def cases_of(op: str, *kinds: str) -> list[Case]:
    """The cases of an operator that are of one of the kinds."""
    return [case for case in import_module(f"lra.kernels.{op}.cases").CASES if case.kind in kinds]


def operator(op: str) -> Callable[..., Any]:
    """The public function of an operator."""
    public: Callable[..., Any] = getattr(import_module(f"lra.kernels.{op}"), op)
    return public


def arguments_of(case: Case, dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Any]:
    """The arguments of a case, drawn from a seed that depends on its name."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
    return case.make(generator, dtype, device)


def to_double(value: Any) -> Any:
    """Convert a floating-point or complex tensor to double precision; return anything else unchanged."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.promote_types(value.dtype, torch.float64))


def differentiable(arguments: dict[str, Any]) -> list[str]:
    """Names of the floating-point and complex tensor arguments."""
    return [k for k, v in arguments.items() if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())]


def outputs_of(result: Any) -> list[Tensor]:
    """The output tensors of an operator as a list, without those that are None."""
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def run(function: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name.

    Gradients are those of every differentiable argument, for one seeded random cotangent per output.
    """
    arguments = dict(arguments)
    names = differentiable(arguments)
    for name in names:
        arguments[name] = arguments[name].detach().requires_grad_()
    outputs = outputs_of(function(**arguments, **options))
    tensors = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for t in outputs:
        cotangent = torch.randn(t.shape, generator=generator, dtype=to_double(t).dtype)
        # rounded, so that runs in float32 and float64 get the same values
        cotangent = cotangent.to(torch.complex64 if t.is_complex() else torch.bfloat16).to(t.device, t.dtype)
        if t.requires_grad:
            pairs.append((t, cotangent))
    grads = torch.autograd.grad(
        [t for t, _ in pairs], [arguments[n] for n in names], [c for _, c in pairs], materialize_grads=True
    )
    return tensors | {f"gradient of {name}": g for name, g in zip(names, grads, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected); an error below the smallest normal number of the dtype counts as 0.

    Infinite if the shapes differ or `actual` is not finite.
    """
    if actual.shape != expected.shape or not bool(
        torch.isfinite(torch.view_as_real(actual) if actual.is_complex() else actual).all()
    ):
        return float("inf")
    error = (to_double(actual) - expected).abs().square().mean().sqrt().item()
    scale = expected.abs().square().mean().sqrt().item()
    return 0.0 if error < torch.finfo(actual.dtype).tiny else error / max(scale, 1e-300)


def bias(actual: Tensor, expected: Tensor) -> float:
    """|mean(error)| / mean(|reference|), errors away from 0 counted as positive, less four standard errors of the mean.

    The error is that beyond the rounding of the reference to the dtype of `actual`.
    """
    error = ((to_double(actual) - to_double(expected.to(actual.dtype))) * expected.sgn().conj()).real.flatten()
    scale = expected.abs().mean().item()
    excess = abs(error.mean().item()) - 4 * error.square().mean().sqrt().item() / error.numel() ** 0.5
    return max(excess, 0.0) / max(scale, 1e-300)


def faults_of(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """The errors of `errors_of` that are above what the dtype of the inputs allows."""
    most = {name: (BIAS if name.startswith("bias of ") else TOLERANCE)[dtype] for name in errors}
    return {name: error for name, error in errors.items() if not error < most[name]}


def errors_of(
    op: str, case: Case, dtype: torch.dtype, device: torch.device = CPU, *, impl: str = "cpu"
) -> dict[str, float]:
    """Relative error and bias of each output and gradient of one implementation, compared with the reference in double
    precision.

    Infinite for an output whose precision differs from that of the arguments.
    """
    arguments = arguments_of(case, dtype, device)
    reference = import_module(f"lra.kernels.{op}.reference").reference
    expected = run(reference, {name: to_double(value) for name, value in arguments.items()})
    actual = run(operator(op), arguments, impl=impl)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    errors |= {f"bias of {name}": bias(actual[name], expected[name]) for name in expected if errors[name] < 1}
    first = actual["output 0"].dtype
    return errors if first.is_complex or first == dtype else errors | {f"output 0 in {first}": float("inf")}
