"""The size of the recurrent state is counted from the state itself, a sequence at a time."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from lra.cli.app import app
from lra.registry import architectures


def size(name: str, tokens: int = 0, **own: object) -> int:
    found: int = architectures.get(name)(d_model=16, n_layers=3, length=32, **own).state_bytes(tokens)
    return found


def test_fixed_states() -> None:
    assert size("gru") == 3 * 16 * 4
    assert size("lstm") == 2 * size("gru")
    assert size("gru", tokens=5) == size("gru")
    # complex64 modes, one of each pair; the output vectors and discrete matrices beside them are every sequence's
    assert size("s4d", state_size=8) == size("s4", state_size=8) == 3 * 16 * 4 * 8
    assert size("linear_ssm", state_size=8) == 3 * 16 * 8 * 4


def test_keys_and_values_grow() -> None:
    start, one, four = (size("transformer", tokens, direction="causal") for tokens in (0, 1, 4))
    assert (start, one, four) == (0, 3 * 2 * 16 * 4, 4 * one)


def test_none_without_a_recurrent_mode() -> None:
    with pytest.raises(NotImplementedError, match="no recurrent mode when bidirectional"):
        size("gru", direction="bidirectional")


def test_check_states_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.conformance import suite

    monkeypatch.setattr(suite, "check", lambda name, **options: [])
    done = CliRunner().invoke(app, ["check", "gru"])
    assert "recurrent state at d_model 128, 4 layers: 2,048 bytes per sequence\n" in done.output
    done = CliRunner().invoke(app, ["check", "transformer"])
    assert "4,096 bytes per sequence, plus 4,096 per token" in done.output
    assert "recurrent" not in CliRunner().invoke(app, ["check", "hyena"]).output
