"""antisymmetric against tensors of the code of arXiv:2006.12070, which runs the plain form."""

from __future__ import annotations

import torch
from golden_tensors import golden
from recurrences import agrees, load, padded, same_gradients
from refusals import refuses

from lra.architectures.recurrent.antisymmetric import Antisymmetric, AntisymmetricMixer


def test_layer_equals_theirs() -> None:
    """Their matrix stands on the right of the state: C is transposed."""
    g = golden("antisymmetric_rnn")
    mixer = AntisymmetricMixer(5, g["cfg.eps"].item(), g["cfg.gamma"].item(), gated=False).double()
    load(mixer, C=g["param.C"].T, E__weight=padded(g["param.E.weight"], 5, 5), E__bias=g["param.E.bias"])
    last = agrees(mixer, g, mixer.init_state(3))
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def test_gated_layer_equals_the_equations() -> None:
    torch.manual_seed(0)
    mixer = AntisymmetricMixer(6, eps=0.3, gamma=0.1, gated=True).double()
    assert mixer.E_gate is not None
    for bias in (mixer.E.bias, mixer.E_gate.bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    W = mixer.C - mixer.C.T - 0.1 * torch.eye(6, dtype=torch.float64)
    h, outputs = torch.zeros_like(x[:, 0]), []
    for token in x.unbind(1):
        z = torch.sigmoid(h @ W.T + mixer.E_gate(token))
        h = h + 0.3 * z * torch.tanh(h @ W.T + mixer.E(token))
        outputs.append(h)
    same_gradients(mixer, x, torch.stack(outputs, 1))


def test_eigenvalues_lie_on_the_line_minus_gamma() -> None:
    torch.manual_seed(0)
    (W,) = AntisymmetricMixer(8, eps=0.1, gamma=0.25, gated=False).weights()
    torch.testing.assert_close(torch.linalg.eigvals(W).real, torch.full((8,), -0.25), rtol=0, atol=1e-5)


test_wrong_arguments_are_named = refuses(Antisymmetric, d_model=8, n_layers=1, length=16)(
    ({"eps": 0.0}, r"eps is 0\.0"),
    ({"gamma": -1.0}, r"gamma is -1\.0"),
)
