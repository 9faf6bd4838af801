"""differential against tensors of the authors' layer, with all keys and with grouped ones."""

from __future__ import annotations

import math

import pytest
from golden_tensors import assert_close, assert_layer_as_stored, everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.attention.differential import Differential, DifferentialMixer

SETS = ("differential_attention", "differential_attention_gqa")


def loaded(g: dict[str, Tensor], causal: bool, positions: str = "rope") -> DifferentialMixer:
    width, heads, groups, depth = (int(g[f"cfg.{n}"]) for n in ("D", "H", "Hkv", "depth"))
    mixer = DifferentialMixer(width, heads, groups, layer=depth, positions=positions, causal=causal).double()
    mixer.load_state_dict({name: g[f"param.{name}"] for name, _ in mixer.named_parameters()})
    return mixer


def stored_gradients(g: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("grad."): t for key, t in g.items() if key.startswith("grad.") and key != "grad.x"}


@pytest.mark.parametrize("name", SETS)
def test_outputs_and_gradients_equal_the_authors_layer(name: str) -> None:
    g = golden(name)
    mixer, x = loaded(g, causal=True), g["x"]
    assert_layer_as_stored(mixer, g, stored_gradients(g))
    assert_close(loaded(g, causal=False)(x, everything(x)), g["mid.y_bidirectional"], 1e-12)
    assert_close(stepped(mixer, x), g["y"], 1e-12)


def test_without_rotation() -> None:
    g = golden("differential_attention")
    y = loaded(g, causal=False, positions="none")(g["x"], everything(g["x"]))
    assert_close(y, g["mid.y_bidirectional_no_rotary"], 1e-12)


def test_the_weight_of_the_second_map_follows_the_depth() -> None:
    encoder = Differential(d_model=16, n_layers=3, length=8)
    first, _, last = (layer.mixer for layer in encoder.blocks)
    assert isinstance(first, DifferentialMixer)
    assert isinstance(last, DifferentialMixer)
    assert (first.lambda_init, last.lambda_init) == pytest.approx((0.2, 0.8 - 0.6 * math.exp(-0.6)))


def test_cache_shrinks_with_the_groups() -> None:
    sizes = [
        Differential(d_model=16, n_layers=1, length=8, direction="causal", n_heads=4, n_kv_heads=n).state_bytes(3)
        for n in (4, 2, 1)
    ]
    assert sizes == [3 * 2 * 16 * 4, 3 * 16 * 4, 3 * 8 * 4]


test_wrong_arguments_are_named = refuses(Differential, d_model=16, n_layers=1, length=8)(
    ({"n_heads": 3}, "n_heads is 3; twice as many, for two maps each, must divide d_model, 16"),
    ({"n_heads": 2, "n_kv_heads": 3}, "n_kv_heads is 3; a divisor of n_heads, 2"),
    ({"positions": "alibi"}, "positions is 'alibi'; one of rope, sinusoidal, learned, none"),
    ({"n_heads": 8}, "an odd number"),
)
