"""mirnn against tensors of the layer in the code of arXiv:2406.05045."""

from __future__ import annotations

import torch
from golden_tensors import golden
from recurrences import agrees, load, padded

from lra.architectures.recurrent.mirnn import MIRNNMixer


def test_layer_equals_theirs() -> None:
    g = golden("mi_rnn")
    mixer = MIRNNMixer(5).double()
    values = {name: g[f"param.{name}"] for name in ("alpha", "u", "beta1", "beta2", "b")}
    load(mixer, w=padded(g["param.w"], 5, 5), **values)
    last = agrees(mixer, g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)
