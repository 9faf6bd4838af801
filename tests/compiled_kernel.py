"""What an operator's Triton kernels take on an H200, found anywhere by compiling them for it as they are launched.

`PYTHONPATH=. python tests/compiled_kernel.py wkv` prints it case by case (all operators by default). Nothing is run, so
that spills of registers show, but neither results nor times.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lra.kernels import _dispatch
from lra.kernels._case import KINDS, Case
from lra.operators.parity import arguments_of, cases_of, operator, operators, run

SHARED = 232_448  # bytes, the most that a block can have there
GRID = (2**31 - 1, 65_535, 65_535)
DEVICE = -1  # Triton keeps what it compiled by device: a GPU that is there must not take these for its own
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.module.removeprefix('lra.kernels.')}.{self.kernel.fn.__name__}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What the types in a kernel depend on: an integer of 1 becomes a constant. Multiples of 16 are told apart by
        Triton as well, but not here."""
        kinds = (x.dtype if isinstance(x, Tensor) else (type(x), x == 1) for x in self.arguments)
        return self.name, *kinds, *sorted((name, str(value)) for name, value in self.options.items())


@dataclass(frozen=True)
class Needs:
    """Bytes of shared memory per block; registers and bytes of stack, where spilled registers go, per thread."""

    shared: int
    registers: int
    stack: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are noted instead of made, and operators take tensors on the CPU for such of a GPU."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    obstacle, gpu = _dispatch._obstacle, torch.device("cuda")

    def on_a_gpu(op: str, name: str, device: torch.device, *flags: bool) -> str:
        return obstacle(op, name, gpu, *flags)

    def note(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, grid, arguments, options))

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(_dispatch, "_obstacle", on_a_gpu):
        yield found


def launches(op: str, case: Case, dtype: torch.dtype) -> list[Launch]:
    """Those of a forward and a backward pass; none where the operator has no kernel for this dtype."""
    arguments = arguments_of(case, dtype)
    with recorded() as found:
        try:
            run(operator(op), arguments, impl="gpu")
        except ValueError as error:
            if "it has no Triton kernel" not in str(error):
                raise
    return found


def needs(launch: Launch) -> Needs:
    """Compiles by the way that a launch takes, up to where it would load the binary."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 0,
    )
    with mock.patch("triton.runtime.jit.driver", SimpleNamespace(active=gpu)):
        kernel = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", told)}
    return Needs(kernel.metadata.shared, used["REG"], used["STACK"])


def fault(launch: Launch) -> str:
    """Why an H200 would not run this, or nothing."""
    if any(size > most for size, most in zip(launch.grid, GRID, strict=False)):
        return f"a grid of {launch.grid}; at most {GRID}"
    try:
        found = needs(launch)
    except Exception as error:  # noqa: BLE001  a compiler fails in many ways, each of them a finding
        return f"{type(error).__name__}: {error}"
    return f"{found.shared:,} bytes of shared memory; at most {SHARED:,}" if found.shared > SHARED else ""


def distinct(op: str, dtypes: tuple[torch.dtype, ...], *kinds: str) -> dict[tuple[Any, ...], tuple[str, Launch]]:
    """The first launch of every kind, and where it is from, by its key."""
    found: dict[tuple[Any, ...], tuple[str, Launch]] = {}
    for dtype in dtypes:
        for case in cases_of(op, *kinds):
            made = launches(op, case, dtype)
            assert made or dtype == torch.float64, f"{op} launches no kernel for {case.name} in {dtype}"
            for launch in made:
                found.setdefault(launch.key, (f"{case.name}, {str(dtype)[6:]}", launch))
    return found


def main(*ops: str) -> None:
    for op in ops or [op for op in operators() if import_module(f"lra.kernels.{op}").HAS_GPU]:
        for where, launch in distinct(op, DTYPES, *KINDS).values():
            print(f"{op}: {where}: {launch.name}: {fault(launch) or needs(launch)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
