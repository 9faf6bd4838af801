"""lipschitz against tensors of the authors' code, plain and gated."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from refusals import refuses

from lra.architectures.recurrent.lipschitz import Lipschitz, LipschitzMixer


@pytest.mark.parametrize("gated", [False, True])
def test_layer_equals_the_authors(gated: bool) -> None:
    """Their matrices stand on the right of the state: B and C are transposed."""
    g = golden("lipschitz_rnn_gated" if gated else "lipschitz_rnn")
    constants = {name: g[f"cfg.{name}"].item() for name in ("eps", "beta", "gamma", "alpha")}
    mixer = LipschitzMixer(5, gated=gated, **constants).double()
    maps = {f"{e}__weight": padded(g[f"param.{e}.weight"], 5, 5) for e in ("E", "E_gate")[: 1 + gated]}
    biases = {f"{e}__bias": g[f"param.{e}.bias"] for e in ("E", "E_gate")[: 1 + gated]}
    load(mixer, B=g["param.B"].T, C=g["param.C"].T, **maps, **biases)
    last = agrees(mixer, g, mixer.init_state(3))
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


test_wrong_arguments_are_named = refuses(Lipschitz, d_model=8, n_layers=1, length=16)(
    ({"eps": 0.0}, r"eps is 0\.0"),
    ({"beta": 0.2}, r"beta is 0\.2"),
)
