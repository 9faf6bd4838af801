"""Profiles: what a cell holds, resuming, memory, growth, the largest that fits, LRA's table, the command."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from records import profile_content as content
from typer.testing import CliRunner

from lra.cli.app import app
from lra.errors import UserError
from lra.profiling import fit, memory, peak, profiler, timing
from lra.profiling.budget import budget_of
from lra.profiling.timing import measure, together
from lra.reports import efficiency, lra_table
from lra.reports import table as tables
from lra.results import profile as stored
from lra.results.profile import Cell, FailedProfile, Profile, machine_name, nearest_steps
from lra.results.record import Environment

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def profiled(name: str, length: int, seconds: float, **changes: Any) -> Any:
    return stored.from_json(content(name, length, seconds, **changes))


SMALL: dict[str, Any] = {"length": 32, "batch": 2, "d_model": 16, "n_layers": 1, "budget": 0.05}


def test_timing_warms_up_and_repeats() -> None:
    calls: list[int] = []
    found = measure(lambda: calls.append(1), CPU, repeats=7, budget=5.0)
    assert found.repeats == 7
    assert 8 <= len(calls) <= 12
    assert found.low <= found.median <= found.high


def test_a_timing_that_does_not_fit_its_budget_has_fewer_repeats() -> None:
    found = measure(lambda: sum(range(300_000)), CPU, repeats=1_000_000, budget=0.2)
    assert 3 <= found.repeats < 1_000_000


def test_a_first_call_that_compiles_is_no_measurement() -> None:
    calls: list[int] = []

    def compiled_once() -> None:
        time.sleep(0.0 if calls else 0.3)
        calls.append(1)

    found = measure(compiled_once, CPU, repeats=7, budget=0.1)
    assert found.repeats == 7
    assert found.high < 0.1


def test_every_call_runs_once_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that the second call loads must not be loaded while the first is timed."""
    order: list[str] = []
    together({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, repeats=3, budget=1.0)
    assert order[:2] == ["a", "b"]


def test_a_call_longer_than_its_budget_is_timed_warm_and_once() -> None:
    calls: list[int] = []

    def slow() -> None:
        time.sleep(0.1 if calls else 0.4)
        calls.append(1)

    found = measure(slow, CPU, budget=0.05)
    assert (found.repeats, len(calls)) == (1, 2)
    assert 0.1 <= found.median < 0.4


def test_conditions_are_what_the_device_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = tmp_path / "cpuinfo"
    cores.write_text("cpu MHz\t\t: 2000.5\nmodel name: x\ncpu MHz\t\t: 3000.5\n")
    zone = tmp_path / "thermal_zone0"
    zone.mkdir()
    (zone / "temp").write_text("45000\n")
    monkeypatch.setattr(timing, "CORES", cores)
    monkeypatch.setattr(timing, "ZONES", tmp_path)
    assert timing.conditions(CPU) == {"clock": 2500.5, "temperature": 45.0}
    monkeypatch.setattr(timing, "CORES", tmp_path / "none")
    monkeypatch.setattr(timing, "ZONES", tmp_path / "none")
    assert timing.conditions(CPU) == {}


def test_a_cell_holds_work_speed_and_memory() -> None:
    found = profiler.measure_cell(Cell("transformer", direction="causal", **SMALL), CPU)
    assert found["flops"]["matmul_counted"] == pytest.approx(found["flops"]["matmul_by_formula"], rel=0.01)
    assert found["flops"]["algorithmic"] < found["flops"]["forward"]
    assert found["memory"]["parameters"] == 4 * found["parameters"] == found["memory"]["gradients"]
    assert found["memory"]["optimiser"] >= 2 * found["memory"]["gradients"]
    parts = sum(found["memory"][key] for key in ("parameters", "gradients", "optimiser", "activations"))
    assert found["memory"]["peak_bytes"] <= parts
    assert set(found["seconds"]) == {"forward", "train", "step"}


def test_work_done_once_for_a_batch_is_shared_by_its_sequences() -> None:
    cell = Cell("linear_ssm", direction="causal", **SMALL)
    found = profiler.measure_cell(cell, CPU)["flops"]
    cost = profiler.Workload(cell, CPU).model.cost(cell.length)  # type: ignore[operator]
    assert cost.batch_matmul > cost.matmul
    # and the long convolution, which is a kernel of ours
    kernel = found["matmul_by_formula"] - (cost.matmul + cost.batch_matmul / cell.batch)
    assert 0 < kernel <= cost.other + cost.batch_other / cell.batch
    assert found["matmul_counted"] == pytest.approx(found["matmul_by_formula"], rel=0.01)
    assert found["forward"] < 0.75 * cost.total


def test_a_classifier_of_bytes_and_a_kernel_that_is_a_product() -> None:
    found = profiler.measure_cell(Cell("gru", task="bytes", **SMALL), CPU)
    assert found["flops"]["matmul_counted"] == pytest.approx(found["flops"]["matmul_by_formula"], rel=0.01)
    assert found["parameters"] > profiler.BYTES * 16


@pytest.mark.parametrize("method", ["process high-water mark above start", "allocator"])
def test_a_peak_counts_what_was_there_before_the_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        def __init__(self, device: torch.device) -> None: ...

        def read(self) -> dict[str, Any]:
            return {"method": method, "peak_bytes": 10**6}

    monkeypatch.setattr(profiler.memory, "Peak", Known)
    found = profiler.measure_memory(Cell("gru", 32, 1, 8, 1), torch.device("cpu"))
    # an allocator's own count holds them already
    before = found["parameters"] + found["optimiser"] if method.startswith("process") else 0
    assert found["peak_bytes"] == 10**6 + before
    whole = found["parameters"] + found["optimiser"] + found["gradients"] + found["activations"]
    assert whole == found["peak_bytes"]


def test_peak_memory_in_a_fresh_process_is_that_of_the_step() -> None:
    """Twice the batch takes twice the activations; 64 MiB of them are certain at this size."""
    one, two = (
        profiler.in_process(profiler.measure_memory, Cell("mingru", 4096, batch, 64, 2), "cpu", 120) for batch in (4, 8)
    )
    assert one["parameters"] == two["parameters"]
    assert one["activations"] > 2**26
    assert two["activations"] / one["activations"] == pytest.approx(2, rel=0.25)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    code = """
import resource, torch
from lra.profiling import memory
def faults(size=2**24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
plain = faults()
assert memory.keep_freed()
kept = [faults() for _ in range(40)]
held = memory.status("VmRSS")
memory.give_back()
print(plain, sum(kept[20:]), held - memory.status("VmRSS"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, kept, given = map(int, done.stdout.split())
    assert plain >= 2**26 // 2**14  # pages of 4 or 16 KiB
    assert kept <= 2 * plain  # of 20 allocations; the heap needs some to find its size
    assert given > 2**25


def test_a_process_that_needs_more_than_its_limit_says_so() -> None:
    cell = Cell("transformer", 4096, 64, 256, 4)
    assert profiler.in_process(profiler.measure_memory, cell, "cpu", 120, 2**28) == {"failed": "out of memory"}


def _answering(monkeypatch: pytest.MonkeyPatch, seconds: Iterator[float] | None = None) -> list[str]:
    """Cells that take 1 s a step, or what `seconds` says, one after the other; gru fails. Returns what was asked."""
    asked: list[str] = []

    def answer(work: object, cell: Cell, *rest: object) -> dict[str, Any]:
        again = " again" if work is profiler.measure_times else ""
        asked.append(f"{cell.architecture} {cell.length}{again}")
        if cell.architecture == "gru":
            return {"failed": "out of memory"}
        made = content("x", 1, next(seconds) if seconds else 1.0, machine={"rate": 1.2e6})
        keys = ("seconds", "machine") if again else ("parameters", "flops", "seconds", "memory", "machine")
        return {key: made[key] for key in keys}

    monkeypatch.setattr(profiler, "in_process", answer)
    return asked


def test_a_profile_goes_on_where_it_was_and_keeps_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch)
    cells = [Cell(name, length, d_model=16) for length in (32, 64) for name in ("gru", "transformer")]
    first = profiler.profile(cells, tmp_path)
    reasons = [p.failed if isinstance(p, FailedProfile) else None for p in first]
    assert reasons == ["out of memory", None, "not tried: failed at 32", None]
    assert isinstance(first[1], Profile)
    assert first[1].mfu == 0.25
    again = profiler.profile(cells, tmp_path)
    assert again == first
    whole = ["gru 32", "transformer 32", "transformer 64", "transformer 32 again", "transformer 64 again"]
    assert asked == whole
    del asked[:]
    next(tmp_path.rglob("transformer*l32*.json")).write_text("{")
    profiler.profile(cells, tmp_path)
    one = ["transformer 32", "transformer 32 again"]
    assert asked == one
    profiler.profile(cells[1:2], tmp_path, fresh=True)
    assert asked == one * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    profiler.profile(cells[1:2], tmp_path)
    assert asked == one * 3


def test_a_file_is_keyed_by_machine_threads_and_dtype(tmp_path: Path) -> None:
    one, two = (Environment(cpu="A CPU x2", threads=threads) for threads in (1, 2))
    paths = {
        Cell("s4d", 32, dtype=dtype).path(tmp_path, machine_name(about))
        for dtype in ("float32", "bfloat16") for about in (one, two, Environment(cpu="A CPU x2", gpu="A GPU"))
    }  # fmt: skip
    assert len(paths) == 6
    assert tmp_path / "profile" / "a-cpu-x2-1-thread-float32" / "s4d-d128-n4-b1-l32-bidirectional.json" in paths


def test_a_cell_of_an_earlier_release_is_read_and_superseded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch)
    (profile,) = profiler.profile([Cell("s4d", 32)], tmp_path)
    (path,) = tmp_path.rglob("*.json")
    earlier = Cell("s4d", 32).earlier_path(tmp_path, "cuda" if torch.cuda.is_available() else "cpu")
    record = json.loads(path.read_text())
    del record["cell"]["dtype"]
    earlier.parent.mkdir()
    earlier.write_text(json.dumps(record))
    path.unlink()
    del asked[:]
    assert profiler.profile([Cell("s4d", 32)], tmp_path) == [profile]
    assert asked == []
    profiler.profile([Cell("s4d", 32, dtype="bfloat16")], tmp_path)
    assert asked == ["s4d 32", "s4d 32 again"]
    profiler.profile([Cell("s4d", 32)], tmp_path, fresh=True)
    assert earlier.is_file()
    assert [p.cell.dtype for p in efficiency.load(tmp_path)] == ["bfloat16", "float32"]


def test_a_cell_of_another_machine_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch)
    record = content("s4d", 32, 1.0, cell=msgspec.structs.asdict(Cell("s4d", 32)))
    place = Cell("s4d", 32).earlier_path(tmp_path, "cuda" if torch.cuda.is_available() else "cpu")
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(record))
    profiler.profile([Cell("s4d", 32)], tmp_path, rounds=1)
    assert asked == ["s4d 32"]


def test_a_utilisation_above_one_fails_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _answering(monkeypatch, iter([0.1]))
    (profile,) = profiler.profile([Cell("s4d", 32)], tmp_path)
    assert isinstance(profile, FailedProfile)
    assert profile.failed.startswith("utilisation of 250 %: ")
    assert efficiency.load(tmp_path) == [profile]


def test_lengths_whose_step_would_take_too_long_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch, iter([1.0, 4.0, 16.0, 1.0, 4.0, 16.0]))
    profiles = profiler.profile([Cell("s4d", n) for n in (32, 64, 128, 256)], tmp_path)
    assert asked[:3] == ["s4d 32", "s4d 64", "s4d 128"]
    assert isinstance(profiles[3], FailedProfile)
    assert profiles[3].failed == "not tried: a training step would take about 64 s"
    assert "s4d 256" not in asked
    assert profiler.expected_step({}, 64) == 0
    assert profiler.expected_step({32: 3.0}, 64) == 6.0


def test_a_forward_slower_than_the_step_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer is disturbed, the second is not."""
    answers = iter([(0.4, 0.02), (0.01, 0.03)])

    def fake(calls: object, *rest: object, **options: object) -> dict[str, timing.Timing]:
        return {name: timing.Timing(s, s, s, 3) for name, s in zip(("forward", "train"), next(answers), strict=True)}

    monkeypatch.setattr(profiler, "together", fake)
    monkeypatch.setattr(profiler, "peak_rate", lambda *_: 1e12)
    seconds = profiler.measure_times(Cell("mingru", **SMALL), CPU)["seconds"]
    assert (seconds["forward"]["median"], seconds["train"]["median"]) == (0.01, 0.02)
    assert next(answers, None) is None


def test_the_peak_is_that_of_the_fastest_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SIZES", {"cpu": (8, 64)})
    monkeypatch.setattr(peak, "time_once", lambda call, device: 1e-3)
    assert peak.peak_rate([(100, 200, 300)], CPU, torch.float32, budget=0.0) == pytest.approx(2 * 6e6 / 1e-3)
    assert peak.peak_rate([(1, 2, 3)], CPU, torch.bfloat16, budget=0.0) == pytest.approx(2 * 64**3 / 1e-3)


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_lifetime_maximum_is_read_in_the_unit_of_the_system(
    system: str, unit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(memory.sys, "platform", system)
    monkeypatch.setattr(memory.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3000))
    used = memory.Peak(CPU).read()
    assert used["peak_bytes"] == 3000 * unit
    assert "lifetime" in str(used["method"])


def test_rounds_go_on_until_the_two_fastest_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch, iter([3.0, 1.0, 1.2, 1.08]))
    (found,) = profiler.profile([Cell("s4d", 32)], tmp_path)
    assert len(asked) == 4
    assert isinstance(found, Profile)
    assert found.seconds.train.median == 1.0
    assert (found.examples_per_second, found.tokens_per_second) == (1.0, 32.0)
    assert [r["train"] for r in found.rounds] == [3.0, 1.0, 1.2, 1.08]
    assert not any("apart: s4d" in note for note in efficiency.tables([found])[0].notes)


def test_rounds_that_never_agree_end_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch, (2.0 ** (4 - n) for n in range(99)))
    progress: list[tuple[int, int]] = []
    on_cell = lambda _, done, total: progress.append((done, total))  # noqa: E731
    (found,) = profiler.profile([Cell("s4d", 32)], tmp_path, on_cell=on_cell)
    assert isinstance(found, Profile)
    assert len(asked) == profiler.ROUNDS == len(found.rounds)
    assert progress == [(n, n + 1) for n in range(profiler.ROUNDS)]
    assert any(note.endswith("10 % apart: s4d at 32") for note in efficiency.tables([found])[0].notes)


def test_a_third_round_needs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch, (2.0**-n for n in range(99)))
    profiler.profile([Cell("s4d", 32), Cell("lru", 32)], tmp_path, patience=0.0)
    assert asked == ["s4d 32", "lru 32", "s4d 32 again", "lru 32 again"]


def test_an_interrupted_profile_takes_only_the_rounds_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answering(monkeypatch)
    profiler.profile([Cell("s4d", 32)], tmp_path, rounds=1)
    assert asked == ["s4d 32"]
    profiler.profile([Cell("s4d", 32)], tmp_path)
    assert asked == ["s4d 32", "s4d 32 again"]


def test_a_round_that_fails_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _answering(monkeypatch)
    profiler.profile([Cell("s4d", 32)], tmp_path, rounds=1)
    monkeypatch.setattr(profiler, "in_process", lambda *_: {"failed": "took longer than 300 s"})
    (found,) = profiler.profile([Cell("s4d", 32)], tmp_path, rounds=2)
    assert isinstance(found, Profile)
    assert found.rounds[1] == {}
    assert found.seconds.train.median == 1.0


def test_growth_is_the_slope_in_log_log_with_its_interval() -> None:
    assert efficiency.exponent([1, 2, 4], [3, 12, 48])[0] == pytest.approx(2)
    assert math.isnan(efficiency.exponent([1, 2], [1, 3])[1])
    slope, half = efficiency.exponent([1, 2, 4, 8], [1, 2.2, 3.8, 8.1])
    assert slope - half < 1 < slope + half
    with pytest.raises(UserError, match="two lengths"):
        efficiency.exponent([1], [1])


def test_growth_leaves_out_lengths_whose_rounds_differ() -> None:
    profiles = [profiled("s4d", n, n * 1e-3) for n in (256, 512)]
    wild = profiled("s4d", 1024, 9.0, rounds=[{"forward": 9.0, "train": 9.0}, {"forward": 1.0, "train": 1.0}])
    assert [c.text for c in efficiency.tables([*profiles, wild])[1].rows[0]][1:5:3] == ["256 .. 512", "1.00"]
    assert len(efficiency.tables([profiles[0], wild])) == 1


def test_growth_says_nothing_of_a_transformer_that_was_measured_at_other_lengths() -> None:
    profiles = [profiled("s4d", n, n * 1e-3) for n in (512, 1024)] + [profiled("transformer", 256, 1e-3)]
    (row,) = efficiency.tables(profiles)[1].rows
    assert row[-1].text == "-"


def test_a_utilisation_on_file_that_cannot_be_is_not_shown() -> None:
    table = efficiency.tables([profiled("tcn", 512, 1.0, mfu=1.58)])[0]
    assert "-" in [c.text for c in table.rows[0]]
    assert any(note.startswith("MFU left out") and note.endswith("tcn at 512") for note in table.notes)


def test_memory_is_that_of_the_nearest_length() -> None:
    profiles = [profiled("s4d", n, 1.0) for n in (256, 1024)] + [profiled("gru", 1024, 1.0)]
    steps = nearest_steps(profiles, "a cpu x2", "float32", 2000)
    assert {name: (p.memory.peak_bytes, p.cell.length) for name, p in steps.items()} == {
        "s4d": (2**24, 1024), "gru": (2**24, 1024),
    }  # fmt: skip
    assert nearest_steps(profiles, "another", "float32", 2000) == {}
    assert nearest_steps(profiles, "a cpu x2, 2 threads", "float32", 2000) == {}
    assert nearest_steps(profiles, "a cpu x2", "bfloat16", 2000) == {}


def test_crossover_is_where_the_curves_meet_for_good() -> None:
    lengths = (256, 512, 1024, 2048)
    square, line = {n: n * n / 1e6 for n in lengths}, {n: 7e2 * n / 1e6 for n in lengths}
    assert efficiency.crossover(line, square) == pytest.approx(700)
    assert efficiency.crossover(square, line) is None
    assert efficiency.crossover({256: 1.0, 512: 1.0}, {256: 2.0, 512: 2.0, 1024: 9.0}) == 256
    # below, above, below: only the last meeting counts
    assert efficiency.crossover({1: 1, 2: 4, 4: 1}, {1: 2, 2: 2, 4: 2}) == pytest.approx(2 * math.sqrt(2))
    assert efficiency.crossover({}, square) is None


def test_the_declared_scaling_is_the_variant_s() -> None:
    known = {"mega": "L^2", "mega/chunk": "L log L", "gru": "L", "mega/chnk": "-", "nothing": "-", "net.py:Net": "-"}
    assert {name: efficiency.declared(name) for name in known} == known


def test_tables_of_profiles(tmp_path: Path) -> None:
    profiles = [profiled(name, n, c * n**e) for name, c, e in (("transformer", 1e-6, 2), ("s4d", 4e-4, 1))
                for n in (256, 1024, 4096)]  # fmt: skip
    profiles.append(profiled("gru", 256, 1, failed="out of memory"))
    cells, growth = efficiency.tables(profiles)
    assert len(cells.rows) == 6
    assert "gru at 256: out of memory" in cells.notes
    lines = {row[0].text: [c.text for c in row] for row in growth.rows}
    assert lines["s4d"][2:5] == ["L log L", "1.00", "1.00"]
    assert lines["transformer"][4] == "2.00"
    assert lines["s4d"][-1] == "from 400"
    rows = list(csv.DictReader(io.StringIO(efficiency.table_csv(profiles))))
    assert len(rows) == 7
    assert all(None not in row and None not in row.values() for row in rows)
    assert rows[-1]["failed"] == "out of memory"
    assert float(rows[0]["train_seconds"]) == pytest.approx(1e-6 * 256**2)
    paths = efficiency.write_figures(profiles, tmp_path)
    assert [p.stem.rpartition("-")[2] for p in paths] == ["training", "memory", "overview"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths[:2])
    assert paths[2].read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    "rounds", [[], [{}], [3], [{"train": 1.0}], [{"forward": 1.0, "train": -1.0}], [{"forward": 1.0, "train": True}]]
)
def test_rounds_that_are_none_are_named(rounds: list[Any]) -> None:
    assert profiled("gru", 256, 1.0, rounds=[{"forward": 1.0, "train": 2.0}, {}])
    with pytest.raises(ValueError, match=r"^rounds"):
        profiled("gru", 256, 1.0, rounds=rounds)


def test_files_that_are_no_profiles_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "bad.json").write_text("{")
    (tmp_path / "profile" / "other.json").write_text('{"cell": 3}')
    (tmp_path / "profile" / "good.json").write_text(json.dumps(content("gru", 256, 1.0)))
    assert [p.cell.architecture for p in efficiency.load(tmp_path)] == ["gru"]
    bad, other = efficiency.problems(tmp_path)
    assert "bad.json: not a profile: not JSON: " in bad
    assert other.endswith("other.json: not a profile: cell is 3; expected object")


def test_lras_table_is_relative_and_beside_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "reported_efficiency.csv").write_text(
        "table,architecture,name,metric,length,value,hardware,source\n"
        "LRA efficiency,Transformer,transformer,train steps/s,1024,8.0,TPU,A paper\n"
        "LRA efficiency,Performer,performer,train steps/s,1024,12.0,TPU,A paper\n"
    )
    profiles = [profiled("transformer", 1024, 1.0), profiled("performer", 1024, 0.5), profiled("performer", 4096, 1.0)]
    speed, memory = lra_table.tables(profiles, tmp_path)
    assert [[c.text for c in row] for row in speed.rows] == [
        ["transformer", "1.00", "-", "-", "-"], ["performer", "2.00 [1.50]", "-", "-", "-"],
    ]  # fmt: skip
    assert memory.rows[1][1].text == "1.00"
    assert "1 steps/s at 1K" in speed.notes[0]


@pytest.mark.parametrize("budget", [999, 1000, 12_345, 10**9, 5])
def test_the_largest_that_fits_is_found(budget: int) -> None:
    tried: list[int] = []

    def peak_of(size: int) -> int | None:
        tried.append(size)
        return 10 * size if size < 100_000 else None

    found = fit.largest(peak_of, budget, first=1, most=4096)
    wanted = min(budget // 10, 4096)
    assert found.value <= wanted
    assert found.value >= 0.95 * wanted - 1
    assert (found.capped, found.peak) == (wanted == 4096, 10 * found.value)
    assert found.tries == len(tried) <= 20


def test_failure_is_like_not_fitting() -> None:
    assert fit.largest(lambda n: None if n > 64 else n, 10**9, first=8, most=4096).value in range(61, 65)
    assert fit.largest(lambda n: None, 10**9, first=8, most=4096).value == 0


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("0.5 MiB", 2**19)])
def test_budgets_are_read(text: str, size: int) -> None:
    assert budget_of(text) == size


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--fit", "much"), "512MiB"), (("--lengths", "1k"), "whole numbers"), (("grru",), "did you mean 'gru'"),
        (("--direction", "back"), "causal or bidirectional"), (("--dtype", "float23"), "did you mean 'float32'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    asked = _answering(monkeypatch)
    done = invoke("transformer", "gru", "--lengths", "64,32", "--d-model", "16")
    assert done.exit_code == 0, done.output
    assert asked[:3] == ["transformer 32", "gru 32", "transformer 64"]
    assert "out of memory" in done.stdout
    assert (tmp_path / "profile" / "profile.csv").is_file()
    assert len(list((tmp_path / "profile").glob("*.png"))) == 2


def test_tree_command() -> None:
    done = invoke("gru", "--tree", "--lengths", "32", "--d-model", "16")
    assert done.exit_code == 0, done.output
    assert "mixer" in done.stdout
    assert "lra.recurrent_cell" in done.stdout
    assert "not counted: nothing" in done.stdout


def test_the_table_says_how_far_the_two_flop_numbers_are_apart_and_leaves_out_what_nobody_has() -> None:
    one, two = profiled("gru", 256, 1.0), profiled("s4d", 512, 1.0)
    work = msgspec.structs.replace(two.flops, matmul_by_formula=two.flops.matmul_counted / 1.02)
    two = msgspec.structs.replace(two, flops=work)
    found = efficiency.tables([one, two])[0]
    assert "work counted and by formula: at most 2.00 % apart (s4d at 512)" in found.notes
    shown = [str(column.header) for column in tables.terminal(found).columns]
    assert "tokens/s" in shown
    assert "decode µs" not in shown
    one = msgspec.structs.replace(one, seconds=msgspec.structs.replace(one.seconds, step=one.seconds.train))
    shown = [str(column.header) for column in tables.terminal(efficiency.tables([one, two])[0]).columns]
    assert "decode µs" in shown


def test_no_profile_on_file_is_impossible() -> None:
    """A forward pass is part of its training step, and nothing is faster than the machine."""
    profiles = [p for p in stored.load(ROOT / "results")[0] if isinstance(p, Profile)]
    assert profiles
    wrong = [p.cell for p in profiles if p.mfu > 1 or p.seconds.forward.median > p.seconds.train.median]
    assert wrong == []
