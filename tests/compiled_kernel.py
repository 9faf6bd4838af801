"""What an operator's Triton kernels take on an H200, found anywhere by compiling them for it as they are launched.

`PYTHONPATH=. python tests/compiled_kernel.py wkv` prints it as CSV, case by case (all operators by default), as in
results/bench/kernels-sm90.csv. Nothing is run, so that spilled registers and narrow loads show, but neither results nor
times.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lra.kernels import _dispatch, _split
from lra.kernels._case import Case
from lra.operators.parity import arguments_of, cases_of, operator, operators, run

SHARED = 163_840  # bytes per block: less than the 227 KiB there are, so that another card can run it too
STACK = 128  # bytes per thread: what spills beyond costs more than a smaller tile
GRID = (2**31 - 1, 65_535, 65_535)
PROCESSORS = 132
DEVICE = -1  # Triton keeps what it compiled by device: a GPU that is there must not take these for its own
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Needs:
    """Bytes of shared memory per block; registers and bytes of stack, where spilled registers go, per thread.

    The rest counts instructions of the machine code: loads from global memory by bits per thread, how many of them are
    asynchronous copies to shared memory, barriers, arithmetic in double precision, the longest loop, and all.
    """

    shared: int
    registers: int
    stack: int
    load_128: int
    load_64: int
    load_32: int
    load_16: int
    copies: int
    barriers: int
    doubles: int
    loop: int
    instructions: int


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
        """What Triton compiles a kernel anew for: types, and which integers are 1 or a multiple of 16."""
        kinds = (x.dtype if isinstance(x, Tensor) else (type(x), x == 1, x % 16 == 0) for x in self.arguments)
        return self.name, *kinds, *sorted((name, str(value)) for name, value in self.options.items())

    @cached_property
    def needs(self) -> Needs:
        """What its kernel takes, compiled by the way that a launch takes, up to where it would load the binary."""
        from triton import knobs
        from triton.backends.compiler import GPUTarget

        gpu = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: DEVICE,
            get_current_stream=lambda device: 0,
        )
        with mock.patch("triton.runtime.jit.driver", SimpleNamespace(active=gpu)):
            kernel = self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (max(map(int, re.findall(rf"\b{name}:(\d+)", told))) for name in ("REG", "STACK"))
        return Needs(kernel.metadata.shared, registers, stack, **counted(told))


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);", re.M)
TARGET = re.compile(r"0x([0-9a-f]+)")


def counted(code: str) -> dict[str, int]:
    """Instructions by kind in what cuobjdump prints of one kernel."""
    found = [(int(at, 16), name.split("."), rest) for at, name, rest in INSTRUCTION.findall(code)]
    kinds = Counter(name[0] for _, name, _ in found)
    bits = Counter(_bits(name) for _, name, _ in found if name[0] in ("LDG", "LDGSTS"))
    jumps = [(at, int(to, 16)) for at, name, rest in found if name[0] == "BRA" for to in TARGET.findall(rest)]
    return {
        **{f"load_{width}": bits[width] for width in (128, 64, 32, 16)},
        "copies": kinds["LDGSTS"],
        "barriers": kinds["BAR"],
        "doubles": sum(kinds[name] for name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")),
        "loop": max([0, *(at - to for at, to in jumps)]) // 16,
        "instructions": len(found) - kinds["NOP"],
    }


def _bits(name: list[str]) -> int:
    """Bits per thread of a load, from the parts of its name; 16 stands for bytes as well."""
    if {"128", "64"} & {*name}:
        return 128 if "128" in name else 64
    return 16 if {"U16", "S16", "U8", "S8"} & {*name} else 32


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

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(_dispatch, "_obstacle", on_a_gpu),
        mock.patch.object(_split, "processors", return_value=PROCESSORS),
    ):
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


def beyond(launch: Launch) -> bool:
    """Whether it has more programs than an H200 takes."""
    return any(size > most for size, most in zip(launch.grid, GRID, strict=False))


def fault(launch: Launch) -> str:
    """Why an H200 would not run this, or not well; or nothing."""
    if beyond(launch):
        return f"a grid of {launch.grid}; at most {GRID}"
    try:
        found = launch.needs
    except Exception as error:  # noqa: BLE001  a compiler fails in many ways, each of them a finding
        return f"{type(error).__name__}: {error}"
    # arithmetic in float64 is there for comparisons, and may be slow
    if found.stack > STACK and str(launch.options.get("ACC")) != "fp64":
        return f"{found.stack:,} bytes of stack; at most {STACK}"
    return f"{found.shared:,} bytes of shared memory; at most {SHARED:,}" if found.shared > SHARED else ""


def distinct(op: str, dtypes: tuple[torch.dtype, ...], *kinds: str) -> dict[tuple[Any, ...], tuple[str, Launch]]:
    """The first launch of every kind, and where it is from, by its key."""
    found: dict[tuple[Any, ...], tuple[str, Launch]] = {}
    for dtype in dtypes:
        for case in cases_of(op, *kinds):
            made = launches(op, case, dtype)
            assert made or dtype == torch.float64 or case.kind == "gpu", (
                f"{op} launches no kernel for {case.name} in {dtype}"
            )
            for launch in made:
                found.setdefault(launch.key, (f"{case.name}, {str(dtype)[6:]}", launch))
    return found


def main(*ops: str) -> None:
    columns = [field.name for field in fields(Needs)]
    table = csv.writer(sys.stdout)
    table.writerow(["operator", "kernel", "case", "dtype", *columns])
    for op in ops or [op for op in operators() if import_module(f"lra.kernels.{op}").HAS_GPU]:
        for where, launch in distinct(op, DTYPES[:2], "gpu", "bench").values():
            case, dtype = where.rsplit(", ", 1)
            used = launch.needs
            table.writerow([op, launch.name, case, dtype, *(getattr(used, name) for name in columns)])
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
