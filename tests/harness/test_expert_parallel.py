"""Processes that divide the experts of a mixture compute what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import divided_experts
import numpy as np
import pytest
import torch
from test_distributed import launched

import lra
from lra.errors import UserError
from lra.training.execution import divide_experts
from lra.training.placement import Placement

HERE = Path(__file__).parents[1]
needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@needs_gloo
def test_two_processes_divide_experts_and_give_the_outputs_and_gradients_of_one(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "divided_experts.py")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=900) for process in started] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in divided_experts.CASES:
        whole = divided_experts.results(name)
        for mine, *shares in zip(whole[:3], *(part[name][:3] for part in parts), strict=True):
            torch.testing.assert_close(torch.cat(shares), mine, rtol=0, atol=1e-12)
        for mine, *sums in zip(whole[3:], *(part[name][3:] for part in parts), strict=True):
            for total in sums:
                torch.testing.assert_close(total, mine, rtol=0, atol=1e-12)


def test_what_cannot_be_divided_is_named() -> None:
    assert Placement(1, 2, "expert_parallel").resolved_strategy == "ddp"
    for name, options, processes, says in (
        ("gru", {}, 2, "GRU has no experts; use ddp"),
        ("soft_moe", {}, 2, "SoftMoE mixes all experts; use ddp"),
        ("switch", {"n_experts": 6}, 4, "6 experts are not divisible among 4 processes"),
    ):
        encoder = lra.create_encoder(name, d_model=8, n_layers=1, length=8, **options)
        with pytest.raises(UserError, match=says):
            divide_experts(encoder, processes)


@needs_gloo
@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_a_run_that_divides_experts_trains_as_one_process(tmp_path: Path) -> None:
    """Its routing is by sequence and without noise, so that shares of a batch are routed as the batch."""
    one = launched(tmp_path / "one", architecture="expert_choice")
    two = launched(tmp_path / "two", "--devices", "2", "--strategy", "expert_parallel", architecture="expert_choice")
    np.testing.assert_allclose(one["loss"], two["loss"], atol=1e-5, rtol=0)
    for key, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][key], atol=1e-4, rtol=1e-4)
    assert two["record"].environment.strategy == "expert_parallel"
