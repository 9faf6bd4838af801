"""second_order against tensors of the authors' code, as a full tensor and as a CP decomposition."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded

from lra.architectures.recurrent.second_order import CPRNNMixer, SecondOrder, SecondOrderMixer


def test_full_tensor_equals_the_authors() -> None:
    g = golden("second_order_rnn")
    mixer, w = SecondOrderMixer(5).double(), g["param.w"]
    # 4 features and a 1 become 5 and a 1: the fifth is always zero
    nothing = torch.zeros(6, 1, 5, dtype=torch.float64)
    load(mixer, w=torch.cat([w[:, :4], nothing, w[:, 4:]], dim=1))
    last = agrees(mixer, g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def test_decomposition_equals_the_authors() -> None:
    g = golden("cprnn")
    mixer = CPRNNMixer(5, rank=6).double()
    own = {name: g[f"param.{name}"] for name in ("A", "C", "V", "d")}
    load(mixer, B=padded(g["param.B"], 5, 6), U=padded(g["param.U"], 5, 5), **own)
    last = agrees(mixer, g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def test_decomposition_is_a_second_order_network() -> None:
    """The full tensor with the decomposition's numbers in it gives the same outputs."""
    torch.manual_seed(0)
    factors, full = CPRNNMixer(4, rank=3).double(), SecondOrderMixer(4).double()
    torch.nn.init.normal_(factors.d)
    with torch.no_grad():
        full.w[:4, :4] = torch.einsum("ir,jr,kr->ijk", factors.A, factors.B, factors.C)
        full.w[:4, 4], full.w[4, :4], full.w[4, 4] = factors.V, factors.U, factors.d
    x, mask = torch.randn(2, 7, 4, dtype=torch.float64), torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(factors(x, mask), full(x, mask), rtol=0, atol=1e-12)


def test_wrong_rank_is_named() -> None:
    with pytest.raises(ValueError, match="rank is -1"):
        SecondOrder(d_model=8, n_layers=1, length=16, rank=-1)


def test_pieces_give_the_outputs_and_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer, x = SecondOrderMixer(4).double(), torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 8, dtype=torch.bool)
    found = []
    for size in (8, 3):
        monkeypatch.setattr("lra.architectures.recurrent.second_order.CHUNK", size)
        y = mixer(x, mask)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, mixer.w))))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
