"""enrnn against tensors of the authors' cell and its matrices."""

from __future__ import annotations

import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from refusals import refuses

from lra.architectures.recurrent.enrnn import ENRNN, ENRNNMixer


def test_layer_equals_the_authors() -> None:
    g = golden("enrnn")
    mixer = ENRNNMixer(9, long=5, negative=2).double()
    torch.testing.assert_close(mixer.D1, g["cfg.D1"], rtol=0, atol=0)
    own = {name: g[f"param.{name}"] for name in ("A1", "W2", "W3", "b")}
    load(mixer, U=padded(g["param.U"], 9, 9), **own)
    last = agrees(mixer, g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)
    W = mixer.weights()[0]
    torch.testing.assert_close(W[:5, :5], g["mid.W1"], rtol=0, atol=1e-13)
    torch.testing.assert_close(W[5:, 5:], g["mid.W2_bar"], rtol=0, atol=1e-13)


def test_gradient_of_the_radius_equals_differences() -> None:
    torch.manual_seed(0)
    mixer = ENRNNMixer(5, long=2, negative=1).double()
    w = torch.randn(3, 3, dtype=torch.float64)

    def scalar(W2: torch.Tensor) -> torch.Tensor:
        given = torch.func.functional_call(_Weights(mixer), {"mixer.W2": W2}, ())
        return (given[2:, 2:] * w).sum()

    assert torch.autograd.gradcheck(scalar, torch.randn(3, 3, dtype=torch.float64, requires_grad=True))


class _Weights(torch.nn.Module):
    def __init__(self, mixer: ENRNNMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self) -> torch.Tensor:
        return self.mixer.weights()[0]


test_wrong_arguments_are_named = refuses(ENRNN, d_model=8, n_layers=1, length=16)(
    ({"long": 1.0}, r"long is 1\.0"),
    ({"negative": 2.0}, r"negative is 2"),
)
