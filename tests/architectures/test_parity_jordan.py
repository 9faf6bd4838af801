"""jordan against tensors of its equations in closed form, with tanh and with linear outputs."""

from __future__ import annotations

import torch
from golden_tensors import golden
from recurrences import agrees, load, padded, same_gradients
from refusals import refuses
from torch import Tensor

from lra.architectures.recurrent.jordan import Jordan, JordanMixer


def loaded(g: dict[str, Tensor], output: str) -> JordanMixer:
    """The stored network has 4 inputs and 3 outputs: a fourth output is always zero."""
    mixer = JordanMixer(4, 5, output).double()
    V, b_y = padded(g["param.V"], 4, 5), padded(g["param.b_y"], 4)
    load(mixer, W=g["param.W"], U=padded(g["param.U"], 5, 4), b_h=g["param.b_h"], V=V, b_y=b_y)
    return mixer


def test_layer_equals_the_closed_form() -> None:
    g = golden("jordan")
    agrees(loaded(g, "tanh"), g, padded(g["y0"], 3, 4))


def test_linear_outputs_equal_the_closed_form() -> None:
    """The set stores no gradient of this form: gradients are those of the equations."""
    g = golden("jordan")
    mixer, x = loaded(g, "linear"), g["x"].requires_grad_()
    y, last = mixer.chunk(x, padded(g["y0"], 3, 4))
    torch.testing.assert_close(y[..., :3], g["mid.y_linear"], rtol=0, atol=1e-12)
    torch.testing.assert_close(last[:, :3], g["mid.y_linear"][:, -1], rtol=0, atol=1e-12)
    torch.manual_seed(0)
    expected, outputs = torch.zeros(3, 4, dtype=torch.float64), []
    for token in x.unbind(1):
        h = torch.tanh(token @ mixer.W.T + expected @ mixer.U.T + mixer.b_h)
        expected = h @ mixer.V.T + mixer.b_y
        outputs.append(expected)
    same_gradients(mixer, x, torch.stack(outputs, 1))


test_wrong_arguments_are_named = refuses(Jordan, d_model=8, n_layers=1, length=16)(
    ({"output": "relu"}, "tanh, linear"),
    ({"hidden": 0.01}, r"hidden is 0\.01"),
)
