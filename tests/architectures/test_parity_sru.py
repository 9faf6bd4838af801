"""sru against tensors of the authors' code, and the memories it starts with."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from refusals import refuses
from torch import Tensor

from lra.architectures.recurrent.sru import SRU, SRUMixer


def loaded(name: str) -> tuple[SRUMixer, dict[str, Tensor]]:
    g = golden(name)
    width, matrices = g["y"].shape[-1], 3 if name == "sru_v2" else 4
    peephole = name != "sru_v1"
    activation = "tanh" if g["cfg.use_tanh"] else "identity"
    mixer = SRUMixer(width, horizon=2, peephole=peephole, projected=matrices == 4, activation=activation).double()
    own = {"weight_c": g["param.weight_c"]} if peephole else {}
    load(mixer, weight=padded(g["param.weight"], width, matrices * width), bias=g["param.bias"], **own)
    mixer.scale_x.copy_(g["cfg.scale_x"])
    return mixer, g


@pytest.mark.parametrize("name", ["sru_v1", "sru_v2", "sru_v2_proj"])
def test_layer_equals_the_authors(name: str) -> None:
    mixer, g = loaded(name)
    last = agrees(mixer, g, g["c0"])
    torch.testing.assert_close(last, g["c_n"], rtol=0, atol=1e-12)


def test_scale_at_the_start_is_the_authors() -> None:
    """Their skip grows by sqrt(1 + 2 exp(b_r)), which the stored layer has for b_r = -1.5."""
    assert golden("sru_v2")["cfg.scale_x"].item() == pytest.approx((1 + 2 * torch.tensor(-1.5).exp().item()) ** 0.5)
    plain, projected = (
        SRUMixer(256, horizon=2, peephole=True, projected=flag, activation="identity") for flag in (False, True)
    )
    assert plain.scale_x.item() == pytest.approx(3**0.5)
    deviations = projected.weight.view(256, 256, 4).std((0, 1)) * 256**0.5
    torch.testing.assert_close(deviations, torch.tensor([1.0, 0.5**0.5, 0.5**0.5, 3**0.5]), rtol=0.02, atol=0)


def test_memories_at_the_start_fill_the_horizon() -> None:
    torch.manual_seed(0)
    forget, highway = SRUMixer(512, horizon=1000, peephole=True, projected=False, activation="identity").bias.chunk(2)
    memories = 1 + forget.exp()  # 1 / (1 - f), for x = c = 0
    assert memories.min() >= 2
    assert memories.max() <= 1000
    assert 450 < memories.mean() < 550
    assert not highway.any()


test_wrong_arguments_are_named = refuses(SRU, d_model=8, n_layers=1, length=16)(
    ({"horizon": 0}, "horizon is 0"),
    ({"activation": "relu"}, "identity, tanh"),
)
