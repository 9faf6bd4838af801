"""liquid_s4 against tensors of the authors' layer, and what its products are."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from golden_tensors import assert_near, everything, golden
from refusals import refuses
from torch import Tensor

from lra.architectures.state_space.liquid_s4 import LiquidS4, LiquidS4Mixer, subsets

SETS: dict[str, dict[str, Any]] = {
    "liquid_s4_polyb_p2": {"ways": 1},
    "liquid_s4_polyb_p3_allcombs_bidirectional": {"degree": 3},
    "liquid_s4_polyb_p3_shift": {"ways": 1, "degree": 3, "products": "shift", "contract": True},
    "liquid_s4_kb_p2": {"ways": 1, "liquid": "kb"},
}


def mixer_of(**own: Any) -> LiquidS4Mixer:
    mixer = LiquidS4(**{"d_model": 3, "n_layers": 1, "length": 40, "state_size": 8, **own}).blocks[0].mixer
    assert isinstance(mixer, LiquidS4Mixer)
    return mixer.double()


def loaded(name: str) -> tuple[LiquidS4Mixer, dict[str, Tensor]]:
    g = golden(name)
    mixer = mixer_of(**SETS[name])
    state = {
        "log_dt": g["param.log_dt"],
        "log_A_real": g["param.inv_w_real"],
        "A_imag": g["param.w_imag"],
        "P": torch.view_as_real(g["param.P"]),
        "B": torch.view_as_real(g["param.B"]),
        "D": g["param.D"].flatten(),
        "output_linear.weight": g["param.out.weight"],
        "output_linear.bias": g["param.out.bias"],
    }
    if mixer.liquid == "pb":
        state["C_liquid"] = torch.view_as_real(g["mid.liquid.C"])
    assert not mixer.load_state_dict(state, strict=False).unexpected_keys
    mixer.set_output(g["param.C"])
    return mixer, g


@pytest.mark.parametrize("name", SETS)
def test_layer_equals_that_of_the_authors(name: str) -> None:
    mixer, g = loaded(name)
    x = g["x"].mT.contiguous().requires_grad_()
    mask = everything(x)
    kernel = mixer.kernel(40)
    assert_near(kernel, g["mid.kernel"], "kernel")
    assert_near(mixer.correction(x, mask, kernel).mT, g["mid.correction"], "correction")
    assert_near(mixer.ssm(x, mask).mT, g["mid.y_ssm"], "z")
    y = mixer(x, mask)
    assert_near(y.mT, g["y"], "y")
    (y * g["w"].mT).sum().backward()
    assert x.grad is not None
    assert_near(x.grad.mT, g["grad.x"], "grad.x")


def test_subsets_are_those_of_the_authors_counted_from_the_end() -> None:
    for p in (2, 3):
        stored = golden("liquid_s4_polyb_p3_allcombs_bidirectional")[f"mid.combs_p{p}"]
        places = stored.max() - stored.flip(0)
        assert torch.equal(subsets(40, p), places.sort(dim=1).values)
        assert len(set(map(tuple, subsets(40, p).tolist()))) == 40


def test_products_of_a_padded_row_are_those_of_the_row_alone() -> None:
    for own in SETS.values():
        mixer = mixer_of(**own)
        x = torch.randn(2, 40, 3, dtype=torch.float64)
        mask = torch.arange(40) < torch.tensor([[40], [7]])
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
        alone = mixer(x[1:, :7], mask[1:, :7])
        assert_near(mixer(x, mask)[1:, :7], alone, "y")


def test_degree_2_sees_every_pair_of_the_last_tokens_once() -> None:
    """Of 10 tokens the 10 pairs among the last 5, written over the whole sequence."""
    mixer = mixer_of(ways=1)
    v = torch.randn(1, 10, 3, dtype=torch.float64)
    expected = {tuple((v[0, i] * v[0, j]).tolist()) for i, j in combinations(range(5), 2)}
    assert {tuple(row) for row in mixer._products(v, 2)[0].tolist()} == expected


test_wrong_arguments_are_named = refuses(LiquidS4, d_model=8, n_layers=1, length=8)(
    ({"direction": "causal"}, "direction is 'causal'"),
    ({"liquid": "polyb"}, "pb, kb"),
    ({"products": "none"}, "all, shift"),
    ({"degree": 1}, "degree is 1"),
    ({"ways": 3}, "ways is 3"),
    ({"liquid": "kb", "ways": 2}, "ways is 2; 1"),
    ({"state_size": 7}, "state_size is 7"),
)
