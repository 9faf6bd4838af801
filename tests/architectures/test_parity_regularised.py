"""lstm and gru with zoneout, weight-drop and norms against tensors with stored masks, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from stepping import run
from torch import Tensor

from lra.architectures.recurrent.gru import GRUMixer
from lra.architectures.recurrent.lstm import LSTM, LSTMMixer


def reordered(t: Tensor, order: Sequence[int], gates: int, dim: int = 0) -> Tensor:
    return torch.cat([t.chunk(gates, dim)[i] for i in order], dim)


def with_masks(mixer: Any, masks: Tensor) -> Any:
    """The mixer in training mode with these shares of the old values kept, (..., B, L, H), in one call or by token."""
    asked = iter(masks.unbind(-2))
    mixer.keeps = lambda x: masks if x.shape[1] > 1 else next(asked).unsqueeze(-2)
    return mixer.train()


def evaluates(mixer: Any, g: dict[str, Tensor], state: Any) -> None:
    """Evaluation, whole and token by token, equals `mid.y_eval`."""
    x = padded(g["x"], *g["x"].shape[:2], mixer.U.shape[1])
    mixer.init_state = lambda batch: state
    mixer.eval()
    whole, stepwise = mixer(x, torch.ones(x.shape[:2], dtype=torch.bool)), run(mixer, x)[0]
    torch.testing.assert_close(whole, g["mid.y_eval"], rtol=0, atol=1e-12)
    torch.testing.assert_close(stepwise, g["mid.y_eval"], rtol=0, atol=1e-12)


def lstm(W: Tensor, R: Tensor, b: Tensor, **own: Any) -> Any:
    mixer: Any = LSTMMixer(5, peephole=False, coupled=False, horizon=2, forget_bias=None, **own).double()
    mixer.d_model = 5
    load(mixer, input__weight=padded(W, 20, 5), U=R, input__bias=b)
    return mixer


def test_zoneout_of_cell_and_output_equals_the_closed_form() -> None:
    g = golden("zoneout_lstm")
    rates = g["cfg.p_c"].item(), g["cfg.p_h"].item()
    weights = g["param.W"], g["param.R"], g["param.b"]
    masks = torch.stack([g["mid.d_c"], g["mid.d_h"]])
    h, c = agrees(with_masks(lstm(*weights, zoneout=rates), masks), g, (g["h0"], g["c0"]))
    torch.testing.assert_close(h, g["h_n"], rtol=0, atol=1e-12)
    torch.testing.assert_close(c, g["c_n"], rtol=0, atol=1e-12)
    evaluates(lstm(*weights, zoneout=rates), g, (g["h0"], g["c0"]))


def test_zoneout_of_the_output_equals_haste() -> None:
    """Their gates are i, g, f, o, and their mask is 1 where the new value is taken."""
    g = golden("zoneout_lstm_haste")
    raw = (g["param.kernel"].T, g["param.recurrent_kernel"].T, g["param.bias"])
    weights, rates = [reordered(t, (0, 2, 1, 3), 4) for t in raw], (0.0, g["cfg.p"].item())
    masks = torch.stack([torch.zeros_like(g["mid.mask"]), 1 - g["mid.mask"]])
    h, c = agrees(with_masks(lstm(*weights, zoneout=rates), masks), g, (g["h0"], g["c0"]))
    torch.testing.assert_close(h, g["h_n"], rtol=0, atol=1e-12)
    torch.testing.assert_close(c, g["c_n"], rtol=0, atol=1e-12)
    evaluates(lstm(*weights, zoneout=rates), g, (g["h0"], g["c0"]))


def test_weight_drop_equals_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    g = golden("weightdrop_lstm")
    bias = g["param.bias_ih_l0"] + g["param.bias_hh_l0"]
    mixer = lstm(g["param.weight_ih_l0"], g["param.weight_hh_l0"], bias, weight_drop=g["cfg.p"].item())
    evaluates(mixer, g, (g["h0"], g["c0"]))
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda U, p, training: U * g["mid.mask"] / (1 - p))
    mixer.train()
    x = padded(g["x"], 3, 8, 5).requires_grad_()
    y = mixer(x, torch.ones(3, 8, dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad[..., :4], g["grad.x"], rtol=0, atol=1e-11)
    mixer.U.data *= g["mid.mask"] / (1 - mixer.weight_drop)  # one step drops nothing
    stepwise, (h, c) = run(mixer, x)
    for found, key in ((stepwise, "y"), (h, "h_n"), (c, "c_n")):
        torch.testing.assert_close(found, g[key], rtol=0, atol=1e-12)


def gru(g: dict[str, Tensor], **own: Any) -> Any:
    """Their gates are z, r, n."""
    mixer: Any = GRUMixer(5, horizon=2, **own).double()
    mixer.d_model = 5
    W, U, b, c = (
        reordered(t, (1, 0, 2), 3)
        for t in (g["param.kernel"].T, g["param.recurrent_kernel"].T, g["param.bias"], g["param.recurrent_bias"])
    )
    gains = {"gamma": reordered(g["param.gamma"], (1, 0, 2), 3, dim=1)} if "param.gamma" in g else {}
    load(mixer, input__weight=padded(W, 15, 5), U=U, input__bias=b, c=c, **gains)
    return mixer


def test_gru_with_norms_equals_haste() -> None:
    g = golden("gru_layernorm_haste")
    last = agrees(gru(g, layernorm=True), g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def test_gru_with_zoneout_equals_haste() -> None:
    g = golden("zoneout_gru_haste")
    rate = g["cfg.p"].item()
    last = agrees(with_masks(gru(g, zoneout=rate), 1 - g["mid.mask"]), g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)
    evaluates(gru(g, zoneout=rate), g, g["h0"])


def test_masks_are_drawn_at_their_rates() -> None:
    torch.manual_seed(0)
    cell, state = LSTMMixer(64, peephole=False, coupled=False, horizon=2, forget_bias=None, zoneout=(0.5, 0.1)).keeps(
        torch.zeros(4, 200, 1)
    )
    assert set(cell.unique().tolist()) == {0.0, 1.0}
    assert abs(cell.mean().item() - 0.5) < 0.01
    assert abs(state.mean().item() - 0.1) < 0.01
    encoder = LSTM(d_model=8, n_layers=1, length=8, weight_drop=0.5)
    x, mask = torch.randn(1, 8, 8), torch.ones(1, 8, dtype=torch.bool)
    assert not torch.equal(encoder(x, mask), encoder(x, mask))
    encoder.eval()
    assert torch.equal(encoder(x, mask), encoder(x, mask))


@pytest.mark.parametrize("name", ["zoneout_c", "zoneout_h", "weight_drop"])
def test_wrong_rates_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 1\.5"):
        LSTM(**{"d_model": 8, "n_layers": 1, "length": 8, name: 1.5})  # type: ignore[arg-type]
