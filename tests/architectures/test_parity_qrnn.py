"""qrnn against tensors of the authors' layer, its recurrence step by step, zoneout, and the memories it starts with."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor, nn

from lra.architectures.recurrent.qrnn import QRNN, QRNNMixer


def loaded(g: dict[str, Tensor], pooling: str) -> QRNNMixer:
    """The stored layers are 4 features wide outside and 5 inside, which the stack never asks for."""
    mixer = QRNNMixer(4, pooling=pooling, window=2, zoneout=0.0, horizon=2)
    weight, bias = g["param.weight"].clone(), g["param.bias"].clone()
    if weight.dim() == 2:  # their code: columns of the present token first, and an f that lets in instead of keeping
        weight = torch.stack([weight[:, 4:], weight[:, :4]], dim=-1)
        weight[5:10], bias[5:10] = -weight[5:10], -bias[5:10]
    mixer.conv = nn.Conv1d(4, len(weight), 2).double()
    mixer.conv.load_state_dict({"weight": weight, "bias": bias})
    return mixer


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_layer_equals_the_authors(pooling: str) -> None:
    g = golden(f"qrnn_{pooling}_w2")
    mixer, x = loaded(g, pooling), g["x"].requires_grad_()
    y, last = mixer.pool(x, g["c0"])
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, g["c_n"], rtol=1e-11, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_gradients_of_every_parameter_equal_the_recurrence(pooling: str) -> None:
    torch.manual_seed(0)
    mixer = QRNNMixer(4, pooling=pooling, window=3, zoneout=0.0, horizon=9).double()
    x, w = torch.randn(2, 2, 17, 4, dtype=torch.float64)
    recurrent, parallel = stepped(mixer, x), mixer(x, torch.ones(2, 17, dtype=torch.bool))
    torch.testing.assert_close(parallel, recurrent, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad((y * w).sum(), list(mixer.parameters())) for y in (parallel, recurrent)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(QRNNMixer(8, pooling="fo", window=2, zoneout=0.0, horizon=2048), 8)


def test_zoneout_keeps_the_state_of_features_when_training_only() -> None:
    torch.manual_seed(0)
    mixer = QRNNMixer(64, pooling="f", window=1, zoneout=0.3, horizon=2)
    x = torch.randn(1, 256, 64)
    h = mixer.pool(x, torch.ones(1, 64))[0]
    before = torch.cat([torch.ones(1, 1, 64), h[:, :-1]], dim=1)
    assert abs((h == before).float().mean().item() - 0.3) < 0.02
    free = QRNNMixer(64, pooling="f", window=1, zoneout=0.0, horizon=2)
    free.load_state_dict(mixer.state_dict())
    # not rescaled: a feature that is not kept moves as far as without zoneout
    moved = h[:, 0] != 1
    torch.testing.assert_close(h[:, 0][moved], free.pool(x, torch.ones(1, 64))[0][:, 0][moved])
    torch.testing.assert_close(mixer.eval().pool(x)[0], free.pool(x)[0])


@pytest.mark.parametrize("pooling", ["fo", "ifo"])
def test_memories_at_the_start_fill_the_horizon(pooling: str) -> None:
    torch.manual_seed(0)
    bias = QRNNMixer(512, pooling=pooling, window=2, zoneout=0.0, horizon=1000).conv.bias
    assert bias is not None
    gates = bias.view(-1, 512)
    memories = 1 + gates[1].exp()  # 1 / (1 - f), for x = 0
    assert memories.min() >= 2
    assert memories.max() <= 1000
    assert 450 < memories.mean() < 550
    if pooling == "ifo":
        assert torch.equal(gates[3], -gates[1])


test_wrong_arguments_are_named = refuses(QRNN, d_model=8, n_layers=1, length=16)(
    ({"pooling": "max"}, "f, fo, ifo"),
    ({"window": 0}, "window is 0"),
    ({"zoneout": 1.0}, r"zoneout is 1\.0"),
    ({"horizon": 0}, "horizon is 0"),
)
