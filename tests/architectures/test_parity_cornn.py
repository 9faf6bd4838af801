"""cornn against tensors of the authors' cell."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load

from lra.architectures.recurrent.cornn import CoRNN, CoRNNMixer


def test_layer_equals_the_authors() -> None:
    g = golden("cornn")
    mixer = CoRNNMixer(5, *(g[f"cfg.{name}"].item() for name in ("dt", "gamma", "epsilon"))).double()
    weight = g["param.i2h.weight"]  # columns: 4 of x, z, y
    fifth = torch.zeros(5, 1, dtype=torch.float64)
    load(mixer, i2h__weight=torch.cat([weight[:, :4], fifth, weight[:, 4:]], 1), i2h__bias=g["param.i2h.bias"])
    z, y = agrees(mixer, g, (g["z0"], g["h0"]))
    torch.testing.assert_close(y, g["h_n"], rtol=0, atol=1e-12)
    torch.testing.assert_close(z, g["z_n"], rtol=0, atol=1e-12)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dt is 0"):
        CoRNN(d_model=8, n_layers=1, length=16, dt=0)
