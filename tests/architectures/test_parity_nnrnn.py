"""nnrnn against tensors of the authors' cell, its penalty, and the orthogonal network it starts as."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from refusals import refuses

from lra.architectures.recurrent.nnrnn import NNRNN, NNRNNMixer


def test_layer_equals_the_authors() -> None:
    g = golden("nnrnn")
    mixer = NNRNNMixer(6, penalty=0.0).double()
    own = {name: g[f"param.{name}"] for name in ("log_P", "T", "theta", "alpha", "b")}
    load(mixer, U=padded(g["param.U"], 6, 6), **own)
    last = agrees(mixer, g, mixer.init_state(3))
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-11)
    torch.testing.assert_close(mixer.basis(), g["mid.P"], rtol=0, atol=1e-13)
    torch.testing.assert_close(mixer.weights()[0], g["mid.V"], rtol=0, atol=1e-13)


def test_matrix_starts_orthogonal() -> None:
    torch.manual_seed(0)
    V = NNRNNMixer(8, penalty=0.0).double().weights()[0]
    torch.testing.assert_close(V @ V.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)


def test_penalty_holds_the_scales_at_one() -> None:
    encoder = NNRNN(d_model=4, n_layers=2, length=8, penalty=0.5)
    mixers = [layer.mixer for layer in encoder.blocks]
    assert encoder.aux_loss() == 0
    with torch.no_grad():
        mixers[0].alpha.copy_(torch.tensor([1.0, 3.0]))  # type: ignore[operator]
        mixers[1].alpha.copy_(torch.tensor([0.0, 1.0]))  # type: ignore[operator]
    loss = encoder.aux_loss()
    assert loss is not None
    assert loss.item() == pytest.approx(0.5 * (4 + 1))


test_wrong_arguments_are_named = refuses(NNRNN, d_model=8, n_layers=1, length=16)(
    ({"d_model": 7}, "d_model is 7"),
    ({"penalty": -1.0}, "penalty is"),
)
