"""Gradient reach: what it measures on a map known in closed form, and the two networks it is there to tell apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from lra.cli.app import app
from lra.conformance.reach import FLOOR, plot, reach
from lra.encoder import Card, Cost, Encoder
from lra.registry import Constructor


class Fading(Encoder):
    """y_L = sum_t 2^(t - L) x_t: |d y_L / d x_t| = 2^(t - L) sqrt(D)."""

    card = Card("", 2000, "", "L", True)

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        ago = torch.arange(x.shape[1] - 1, -1, -1)
        return (x * self.rate ** ago.unsqueeze(-1)).cumsum(1)

    def cost(self, length: int) -> Cost:
        return Cost()


def test_norm_is_the_jacobian_s() -> None:
    norms = reach(Constructor("fading", Fading), length=40, d_model=16, probes=500)
    expected = 16**0.5 * 0.5 ** torch.arange(39, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(norms, expected, rtol=0.1, atol=0)


def test_elman_vanishes_where_lru_does_not() -> None:
    elman, lru = reach("elman", length=512, d_model=32), reach("lru", length=512, d_model=32)
    assert elman[0] < 1e-12 * elman[-1]
    assert lru[0] > 1e-6 * lru[-1]


def test_plot_shows_what_has_vanished_as_empty() -> None:
    lines = plot(torch.tensor([0.0, FLOOR, 1e-10, 1.0]), rows=4).splitlines()
    assert [line[8:] for line in lines[:4]] == ["   █", "   █", "  ██", "  ██"]
    assert lines[0].startswith(" 1e+00 |")


def test_command_draws_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.conformance import reach as kit

    monkeypatch.setattr(kit, "reach", lambda constructor: torch.logspace(-9, 0, 50, dtype=torch.float64))
    path = tmp_path / "reach.png"
    done = CliRunner().invoke(app, ["check", "elman", "--reach", "--png", str(path)])
    assert done.exit_code == 0
    assert "first input 1.0e-09, last 1.0e+00" in done.output
    assert path.read_bytes()[:4] == b"\x89PNG"
    wrong = CliRunner().invoke(app, ["check", "elman", "--png", str(path)])
    assert wrong.exit_code == 2
