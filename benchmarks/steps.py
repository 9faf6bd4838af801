"""The measurements of `make gpu`, step by step, with the results written after each: `python -m benchmarks steps`.

`measure/gpu.json` in the results folder holds the results by step. A step that is there is not repeated, unless the
file comes from another device, another version of PyTorch or another commit. Where a review of the compiled kernels has
predicted a number, it is printed beside the measured one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.peers import peers
from lra import files
from lra.kernels._case import Case
from lra.operators import bench, parity
from lra.profiling.timing import measure

RISK = (
    "selective_scan", "decay_attention", "delta_rule", "causal_conv1d", "expert_mlp", "band_attention", "linear_scan",
    "ssm_kernel_diag", "wkv", "recurrent_cell",
)  # fmt: skip
"""Operators with Triton kernels, those whose faults the interpreter and the compiler show least first."""
SIZES: dict[str, tuple[Any, ...]] = {
    "selective_scan": (16,), "decay_attention": (64, 64), "delta_rule": (64, 64), "causal_conv1d": (4,),
    "band_attention": (64, 128), "linear_scan": (), "wkv": (),
}  # fmt: skip
"""Sizes behind (batch, length, width) in the inputs of an operator; of some the width is made up of heads."""
SHAPES = {"B8 L8192 D512": (8, 8192, 512), "B1 L65536 D512": (1, 65536, 512), "B32 L1024 D128": (32, 1024, 128)}
DTYPES = (torch.float32, torch.bfloat16)
HEAD = 64


@dataclass(frozen=True)
class Step:
    """A measurement. run: device -> results, of which "value" is the one that `predicted` is about; a result "wrong"
    says why the step has failed."""

    part: str
    name: str
    run: Callable[[torch.device], dict[str, Any]]
    predicted: float | None = None


def inputs(op: str, batch: int, length: int, width: int) -> Case:
    """A case of an operator."""
    by_head = op in ("decay_attention", "delta_rule", "band_attention")
    shape = (batch, length, width // HEAD if by_head else width)
    make = import_module(f"lra.kernels.{op}.cases")._inputs(*shape, *SIZES[op])
    return Case(f"B{batch} L{length} D{width}", "bench", make)


def agreement(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Parity of every small, edge and GPU case, and whether a second run gives the same bits."""
    worst: tuple[float, str] = 0.0, ""
    wrong = []
    for case in parity.cases_of(op, "small", "edge", "gpu"):
        try:
            errors = parity.errors_of(op, case, dtype, device, impl="gpu")
        except ValueError as error:
            if "it has no Triton kernel" in str(error):
                continue
            raise
        worst = max(worst, *((error, f"{case.name}: {name}") for name, error in errors.items()))
        wrong += [f"{case.name}: {name}: {error:.1e}" for name, error in parity.faults_of(errors, dtype).items()]
        first, second = (
            parity.run(parity.operator(op), parity.arguments_of(case, dtype, device), impl="gpu") for _ in range(2)
        )
        wrong += [
            f"{case.name}: {name} differs from run to run" for name in first if not same(first[name], second[name])
        ]
    return {"value": worst[0], "where": worst[1]} | ({"wrong": wrong} if wrong else {})


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def beyond_32_bits(op: str, device: torch.device, rows: int = 65) -> dict[str, Any]:
    """More than 2^31 elements in a tensor: the last row must come out as it does alone."""
    arguments = parity.arguments_of(inputs(op, rows, 65536, 512), torch.bfloat16, device)
    alone = {
        name: value[-1:] if isinstance(value, Tensor) and value.ndim > 2 and len(value) == rows else value
        for name, value in arguments.items()
    }
    with torch.no_grad():
        last = parity.outputs_of(parity.operator(op)(**arguments, impl="gpu"))[0][-1:].clone()
        expected = parity.outputs_of(parity.operator(op)(**alone, impl="gpu"))[0]
    difference = (last.float() - expected.float()).abs().max().item()
    return {"value": difference} | (
        {} if same(last, expected) else {"wrong": ["the last row differs from itself alone"]}
    )


def times(op: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Seconds of ours and of other packages by pass, beside the floor; value: ours over the floor, forward."""
    rows = list(bench.measure_case(op, inputs(op, *shape), dtype, device, 0.15, peers))
    seconds = {f"{m.implementation}, {m.passes}": m.timing.median for m in rows}
    floors = {m.passes: m.floor for m in rows}
    return {"value": seconds["gpu, forward"] / floors["forward"], "seconds": seconds, "floors": floors}


def seconds_of(case: Case, op: str, dtype: torch.dtype, device: torch.device, backward: bool = False) -> float:
    bind = bench.forward_backward if backward else bench.forward
    call = bind(
        bench.Contender("gpu", partial(parity.operator(op), impl="gpu"), parity.arguments_of(case, dtype, device))
    )
    return measure(call, device, budget=0.3).median


def ratio(first: Callable[[torch.device], float], second: Callable[[torch.device], float]) -> Callable[..., Any]:
    def run(device: torch.device) -> dict[str, Any]:
        one, other = first(device), second(device)
        return {"value": one / other, "seconds": [one, other]}

    return run


def by_kernel(op: str, case: Case, share_of: str, device: torch.device, backward: bool = False) -> dict[str, Any]:
    """Seconds on the device by kernel and launches of one call; value: the share of one kernel, or all launches."""
    arguments = parity.arguments_of(case, torch.bfloat16, device)
    bind = bench.forward_backward if backward else bench.forward
    call = bind(bench.Contender("gpu", partial(parity.operator(op), impl="gpu"), arguments))
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    seconds: dict[str, float] = {}
    for event in kernels:
        seconds[event.name] = seconds.get(event.name, 0.0) + event.device_time / 1e6
    value = seconds.get(share_of, 0.0) / sum(seconds.values()) if share_of else float(len(kernels))
    return {"value": value, "launches": len(kernels), "seconds": seconds}


@contextmanager
def launched_with(**options: int) -> Iterator[None]:
    """Triton kernels take these launch options instead of their own."""
    from triton.runtime.jit import JITFunction

    own = JITFunction.run

    def run(kernel: Any, *arguments: Any, **given: Any) -> Any:
        return own(kernel, *arguments, **given | options)

    with mock.patch.object(JITFunction, "run", run):
        yield


def settings(op: str, device: torch.device) -> dict[str, Any]:
    """Seconds of both passes by num_warps and num_stages; value: the kernels' own settings over the best."""
    case = inputs(op, 8, 8192, 512)
    found: dict[str, float | str] = {}
    own = seconds_of(case, op, torch.bfloat16, device, backward=True)
    for warps, stages in product((2, 4, 8), (1, 2, 3, 4)):
        with launched_with(num_warps=warps, num_stages=stages):
            try:
                found[f"{warps} warps, {stages} stages"] = seconds_of(case, op, torch.bfloat16, device, backward=True)
            except RuntimeError as error:  # out of shared memory or registers
                found[f"{warps} warps, {stages} stages"] = str(error).splitlines()[0]
    best = min(s for s in found.values() if isinstance(s, float))
    return {"value": own / best, "own": own, "seconds": found}


def steps() -> Iterator[Step]:
    for op, dtype in product(RISK, DTYPES):
        yield Step("parity", f"{op} {str(dtype)[6:]}", partial(agreement, op, dtype))
    for op in SIZES:
        yield Step("parity", f"{op} beyond 2^31 elements", partial(beyond_32_bits, op), 0.0)
    for (name, shape), op, dtype in product(SHAPES.items(), SIZES, DTYPES):
        yield Step("times", f"{op} {name} {str(dtype)[6:]}", partial(times, op, shape, dtype))
    yield from _kernels()
    for op in ("linear_scan", "selective_scan", "decay_attention"):
        yield Step("widths", f"launch settings of {op}", partial(settings, op), 1.0)


def _kernels() -> Iterator[Step]:
    """Numbers that were predicted from the compiled kernels."""
    large = SHAPES["B8 L8192 D512"]
    delta, decay, selective, scan, average = (
        inputs(op, *large) for op in ("delta_rule", "decay_attention", "selective_scan", "linear_scan", "wkv")
    )
    attend = import_module("lra.kernels.band_attention.cases")._inputs(1, 8192, 8, 64, 128, n_global=1)
    longformer = Case("one global token", "bench", attend)
    lstm = next(case for case in parity.cases_of("recurrent_cell", "bench") if case.name.endswith(" lstm"))
    half, single = torch.bfloat16, torch.float32

    def time(case: Case, op: str, dtype: torch.dtype = half, backward: bool = False) -> Callable[[torch.device], float]:
        return lambda device: seconds_of(case, op, dtype, device, backward)

    shares = partial(by_kernel, "delta_rule", delta, "_systems")
    yield Step("kernels", "share of the systems in a forward pass of delta_rule", shares, 0.5)
    shares = partial(by_kernel, "decay_attention", decay, "_states", backward=True)
    yield Step("kernels", "share of the states in both passes of decay_attention", shares)
    launches = partial(by_kernel, "band_attention", longformer, "", backward=True)
    yield Step("kernels", "launches of Longformer's attention with one global token, L 8192", launches, 150.0)
    both = time(selective, "selective_scan", backward=True)
    yield Step(
        "kernels", "selective_scan, both passes over forward", ratio(both, time(selective, "selective_scan")), 5.0
    )
    alone = time(inputs("linear_scan", *SHAPES["B1 L65536 D512"]), "linear_scan")
    yield Step("kernels", "linear_scan, B 1 over B 8 with as many tokens", ratio(alone, time(scan, "linear_scan")), 8.0)
    yield Step("kernels", "wkv, bfloat16 over float32", ratio(time(average, "wkv"), time(average, "wkv", single)), 1.1)
    yield Step("kernels", "seconds a step of lstm, beside cuDNN's", partial(cells, lstm))
    narrow, wide = (time(inputs("linear_scan", 32, 4096, d), "linear_scan", backward=True) for d in (124, 128))
    yield Step("widths", "linear_scan, D 124 over D 128", ratio(narrow, wide), 1.1)


def cells(case: Case, device: torch.device) -> dict[str, Any]:
    rows = list(bench.measure_case("recurrent_cell", case, torch.float32, device, 0.3, peers))
    seconds = {f"{m.implementation}, {m.passes}": m.timing.median / 1024 for m in rows}
    return {"value": seconds["gpu, forward"], "seconds": seconds}


def run(part: str, device: torch.device, path: Path, say: Callable[[str], None]) -> bool:
    """Run the steps of a part that `path` does not hold yet and write it after each. Returns whether none is wrong.

    A step that raises is recorded with its error, and counts as wrong.
    """
    machine = {name: str(value) for name, value in bench.machine_columns(device).items() if name != "date"}
    content = _read(path)
    if content.get("machine") != machine:
        content = {"machine": machine, "steps": {}}
    done: dict[str, Any] = content["steps"]
    right = True
    for step in (step for step in steps() if step.part == part):
        before = step.name in done
        if not before:
            try:
                done[step.name] = step.run(device)
            except Exception as error:  # noqa: BLE001  a kernel that has never run may raise anything
                done[step.name] = {"wrong": [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]}
            if step.predicted is not None:
                done[step.name]["predicted"] = step.predicted
            with files.atomic(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        result = done[step.name]
        right = right and "wrong" not in result
        found = f"{result['value']:.3g}" if "value" in result else ""
        predicted = "" if step.predicted is None else f" (predicted {step.predicted:g})"
        faults = "".join(f"\n    wrong: {fault}" for fault in result.get("wrong", ()))
        say(f"{step.name}: {found}{predicted}{' from an earlier run' if before else ''}{faults}")
    return right


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("steps"), dict) else {}
