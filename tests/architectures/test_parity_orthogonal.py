"""orthogonal against tensors of the authors' code, both maps, and what keeps its matrix orthogonal."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded

from lra.architectures.recurrent.orthogonal import MAPS, Orthogonal, OrthogonalMixer


@pytest.mark.parametrize("map", MAPS)
def test_layer_equals_the_authors(map: str) -> None:
    g = golden("exprnn_cayley" if map == "cayley" else "exprnn")
    mixer = OrthogonalMixer(6, map).double()
    load(mixer, A=g["param.A"], input_kernel=padded(g["param.input_kernel"], 6, 6), b=g["param.b"])
    # their exponential is a rational function good for 32 bits, off by 1e-10 itself
    tolerance = {"y": 1e-9, "grad": 1e-9} if map == "cayley" else {"y": 1e-8, "grad": 1e-7}
    last = agrees(mixer, g, g["h0"], **tolerance)
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=tolerance["y"])
    torch.testing.assert_close(mixer.weights()[0], g["mid.B"], rtol=0, atol=tolerance["y"])


@pytest.mark.parametrize("map", MAPS)
def test_matrix_is_orthogonal_at_the_start_and_after_a_step(map: str) -> None:
    torch.manual_seed(0)
    mixer = OrthogonalMixer(7, map).double()
    start = mixer.weights()[0].detach()
    assert (start - torch.eye(7)).abs().max() > 0.1
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    mixer(x, torch.ones(2, 5, dtype=torch.bool)).square().sum().backward()
    torch.optim.SGD(mixer.parameters(), lr=0.1).step()
    for matrix in (start, mixer.weights()[0]):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.linalg.det(matrix).item() == pytest.approx(1)
    assert (mixer.weights()[0] - start).abs().max() > 1e-3


def test_wrong_map_is_named() -> None:
    with pytest.raises(ValueError, match="exponential, cayley"):
        Orthogonal(d_model=8, n_layers=1, length=16, map="householder")
