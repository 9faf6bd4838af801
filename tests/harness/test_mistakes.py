"""A common mistake in a user's layer is named once, with the user's own line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lra.cli.app import app
from lra.conformance import diagnosis
from lra.conformance.context import CheckContext
from lra.conformance.suite import check
from lra.registry import architectures

LAYERS = """import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d_model, n_heads=2):
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, n_heads, batch_first=True)

    def forward(self, x, mask):
        return self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


class Inverted(Attention):
    def forward(self, x, mask):
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


class InvertedMean(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def forward(self, x, mask):
        weight = (~mask).unsqueeze(-1).to(x.dtype)
        return (self.map(x) * weight).sum(1, keepdim=True) / (1 + weight.sum(1, keepdim=True)) + x


class Tuple(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.rnn = nn.GRU(d_model, d_model, batch_first=True)

    def forward(self, x):
        return self.rnn(x)


class SequenceFirst(Tuple):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.rnn = nn.GRU(d_model, d_model)

    def forward(self, x):
        return self.rnn(x)[0]


class OnTheCPU(Tuple):
    def forward(self, x):
        y = self.rnn(x)[0]
        return y * torch.ones(y.shape[-1])


class TableOnTheCPU(Tuple):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.table = torch.ones(d_model)

    def forward(self, x):
        return self.rnn(x)[0] + self.table


class Raises(Tuple):
    def __init__(self, d_model):
        super().__init__(d_model)
        raise RuntimeError("no such thing")


class Needs(Attention):
    def __init__(self, d_model, n_heads):
        super().__init__(d_model, n_heads)


class Forgets(Attention):
    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]
"""
MISTAKES = {
    "Inverted": ("your mask is inverted: True = real token", "def forward(self, x, mask):", 2),
    "InvertedMean": ("your mask is inverted: True = real token", "def forward(self, x, mask):", 3),
    "Tuple": ("Tuple.forward returned a tuple of 2; return the tensor (B, L, D) alone", "def forward(self, x):", 1),
    "SequenceFirst": ("SequenceFirst takes (L, B, D)", "def forward(self, x):", 2),
    "OnTheCPU": ("makes a tensor that stays on the CPU", "return y * torch.ones", 1),
    "TableOnTheCPU": ("makes a tensor that stays on the CPU", "return self.rnn(x)[0] + self.table", 1),
}


@pytest.fixture(autouse=True)
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "layers.py").write_text(LAYERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def line_of(text: str, occurrence: int) -> int:
    return [n for n, line in enumerate(LAYERS.splitlines(), 1) if line.strip().startswith(text)][occurrence - 1]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_once_at_the_users_line(name: str) -> None:
    says, text, occurrence = MISTAKES[name]
    [finding] = check(f"layers.py:{name}")
    assert finding.failed
    assert says in finding.message
    assert finding.message.endswith(f"(layers.py:{line_of(text, occurrence)})")


@pytest.mark.parametrize("name", ["layers.py:Attention", "layers.py:Forgets", "gru", "transformer", "fnet", "lmu"])
def test_what_is_right_or_wrong_otherwise_is_not_taken_for_a_mistake(name: str) -> None:
    assert diagnosis.mistake(CheckContext(architectures.get(name))) == ""


def test_a_constructor_that_raises_or_lacks_arguments_is_one_line() -> None:
    done = CliRunner().invoke(app, ["check", "layers.py:Raises"])
    assert done.exit_code == 1
    [finding] = check("layers.py:Raises")
    line = LAYERS.splitlines().index('        raise RuntimeError("no such thing")') + 1
    assert finding.message.endswith(f"its constructor raised RuntimeError: no such thing (layers.py:{line})")
    [finding] = check("layers.py:Needs")
    assert "Needs also needs n_heads" in finding.message
    words = ["check", "layers.py:Needs", "--set", "encoder.layer.n_heads=4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "padding_length" in done.output


def test_a_run_refuses_a_mistake_before_it_loads_data(layers: Path) -> None:
    done = CliRunner().invoke(app, ["run", "listops", "layers.py:Inverted"])
    assert done.exit_code == 2
    assert "error: layers.py:Inverted: your mask is inverted" in done.stderr
    assert not (layers / "lra_cache").exists()
