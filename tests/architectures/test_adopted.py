"""A layer in a user's own file, which inherits nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lra.conformance.suite import Finding, check
from lra.errors import UserError
from lra.registry import architectures

LAYERS = '''
import torch
from torch import nn
from lra.encoder import Cost


class GatedConv(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.conv = nn.Conv1d(d_model, 2 * d_model, 3, padding=1)

    def forward(self, x):
        value, gate = self.conv(x.mT).chunk(2, dim=1)
        return (value * gate.sigmoid()).mT


class MaskedMean(nn.Module):
    def __init__(self, features, scale=1.0):
        super().__init__()
        self.out, self.scale = nn.Linear(features, features), scale

    def forward(self, x, mask):
        real = mask.unsqueeze(-1).to(x.dtype)
        return self.out((x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(x) * self.scale


class ForgetsTheMask(nn.Module):
    """Attention in which padded keys take part."""

    def __init__(self, dim, max_len=0):
        super().__init__()
        self.attention, self.max_len = nn.MultiheadAttention(dim, 2, batch_first=True), max_len

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tuple(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.rnn = nn.GRU(d_model, d_model, batch_first=True)

    def forward(self, x):
        return self.rnn(x)


class Raises(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.out(x) @ self.missing


class Declares(nn.Module):
    causal = True

    def __init__(self, d_model):
        super().__init__()
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.out(x).cumsum(1)

    def cost(self, length):
        return Cost.linear(length, self.out.in_features, self.out.in_features) + Cost(other=length * 16.0)

    def init_state(self, batch):
        return self.out.weight.new_zeros(batch, self.out.in_features)

    def step(self, x, state):
        state = state + self.out(x)
        return state, state


class DeclaresWrongly(Declares):
    causal = False

    def cost(self, length):
        return 2 * super().cost(length)


class Needs(nn.Module):
    def __init__(self, d_model, kernel):
        super().__init__()
        self.conv = nn.Conv1d(d_model, d_model, kernel, padding=kernel // 2)

    def forward(self, x):
        return self.conv(x.mT).mT


class NoForward(nn.Module):
    def __init__(self, d_model):
        super().__init__()


class NoWidth(nn.Module):
    def forward(self, x):
        return x


def function(x):
    return x
'''


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_layers.py").write_text(LAYERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {f.check: f for f in findings}


@pytest.mark.usefixtures("layers")
def test_a_plain_layer_passes_and_what_it_does_not_declare_is_said() -> None:
    found = by_check(check("my_layers.py:GatedConv"))
    assert not [f for f in found.values() if f.failed]
    assert {name for name, f in found.items() if f.status == "undeclared"} == {"card", "causal", "step", "cost"}
    assert "sees the past and the future" in found["causal"].message


@pytest.mark.usefixtures("layers")
def test_a_layer_that_takes_the_mask_and_calls_the_width_otherwise() -> None:
    assert not [f for f in check("my_layers.py:MaskedMean", only=["shape", "padding", "padding_length"]) if f.failed]
    encoder = architectures.get("my_layers.py:MaskedMean")(d_model=8, n_layers=2, length=9, layer={"scale": 3.0})
    assert [layer.mixer.inner.scale for layer in encoder.layers] == [3.0, 3.0]


@pytest.mark.usefixtures("layers")
def test_a_broken_layer_is_told_what_is_wrong() -> None:
    found = check("my_layers.py:ForgetsTheMask", only=["shape", "padding", "padding_length", "batch", "gradients"])
    [broken] = [f for f in found if f.failed]
    assert broken.check == "padding_length"
    assert "take lengths from the mask" in broken.message
    encoder = architectures.get("my_layers.py:ForgetsTheMask")(d_model=8, n_layers=1, length=77)
    assert encoder.layers[0].mixer.inner.max_len == 77


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Tuple", "raised ValueError: Tuple returned a tuple; expected a tensor of shape (2, 32, 16)"),
        ("Raises", "raised AttributeError: 'Raises' object has no attribute 'missing'"),
    ],
)
def test_a_layer_that_raises(name: str, said: str) -> None:
    [found] = check(f"my_layers.py:{name}", only=["shape"])
    assert found.status == "fail"
    assert found.message.startswith(said)
    assert ".py:" in found.message


@pytest.mark.usefixtures("layers")
def test_what_a_layer_declares_is_checked() -> None:
    declared = ["causal", "step", "cost"]
    assert [f.status for f in check("my_layers.py:Declares", only=declared)] == ["pass"] * 3
    wrong = by_check(check("my_layers.py:DeclaresWrongly", only=declared))
    assert wrong["causal"].status == wrong["cost"].status == "fail"


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("function", "function is not a class derived from torch.nn.Module"),
        ("NoForward", "NoForward defines no forward"),
        ("NoWidth", "the constructor of NoWidth takes no width; give it an argument d_model"),
        ("GatedCnov", "did you mean 'GatedConv'?"),
    ],
)
def test_what_cannot_be_adopted(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        architectures.get(f"my_layers.py:{name}")
    assert said in str(error.value)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    ("layer", "said"),
    [({}, "Needs also needs kernel"), ({"kernle": 3}, "Needs takes no 'kernle'; did you mean 'kernel'?")],
)
def test_arguments_of_the_layer(layer: dict[str, Any], said: str) -> None:
    constructor = architectures.get("my_layers.py:Needs")
    with pytest.raises(UserError) as error:
        constructor(d_model=8, n_layers=1, length=9, layer=layer)
    assert said in str(error.value)
    encoder = constructor(d_model=8, n_layers=1, length=9, layer={"kernel": 5})
    assert encoder(torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)).shape == (2, 9, 8)
    [found] = check(constructor)
    assert (found.check, found.status) == ("signature", "fail")
    assert "Needs also needs kernel" in found.message
    assert not [f for f in check(constructor, only=["shape"], options={"layer": {"kernel": 5}}) if f.failed]


def test_a_module_of_pytorch_by_its_dotted_name() -> None:
    constructor = architectures.get("torch.nn:LayerNorm")
    assert not constructor.declared
    assert constructor.options()["block"] is None
    constructor(d_model=8, n_layers=1, length=9)
