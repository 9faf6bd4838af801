"""indrnn against tensors of the authors' recurrence, its bound, its recurrent mode, and the properties of its start."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from stepping import assert_steps_equal_forward, run, stepped

from lra.architectures.recurrent.indrnn import IndRNN, IndRNNMixer
from lra.kernels.recurrent_cell import recurrent_cell


def mixers(**own: Any) -> list[IndRNNMixer]:
    found = [layer.mixer for layer in IndRNN(**own).blocks]
    assert all(isinstance(mixer, IndRNNMixer) for mixer in found)
    return found  # type: ignore[return-value]


def test_recurrence_equals_the_authors() -> None:
    """The stored layer takes 4 features to 6 units; the missing ones become features that are always zero."""
    g = golden("indrnn")
    mixer = IndRNNMixer(6, bound=float(g["mid.U_bound"]), floor=0.0).double()
    with torch.no_grad():
        mixer.input.weight.copy_(torch.nn.functional.pad(g["param.weight_ih"], (0, 2)))
        mixer.input.bias.copy_(g["param.bias"])
        mixer.u.copy_(g["mid.weight_hh_unclipped"])
    x = torch.nn.functional.pad(g["x"], (0, 2)).requires_grad_()
    # they start from a state of their own, as the recurrent mode alone can
    y, h = run(mixer, x, g["h0"])
    torch.testing.assert_close(mixer.recurrent_weight(), g["param.weight_hh"], rtol=0, atol=0)
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, g["h_n"], rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad[..., :4], g["grad.x"], rtol=1e-11, atol=1e-11)
    fused = recurrent_cell(mixer.input(x), mixer.recurrent_weight(), None, "indrnn", g["h0"])
    torch.testing.assert_close(fused, g["y"], rtol=1e-12, atol=1e-12)


def test_the_bound_is_the_authors() -> None:
    g = golden("indrnn")
    [mixer] = mixers(d_model=4, n_layers=1, length=int(g["cfg.seq_len"]), gamma=float(g["cfg.MAG"]))
    assert mixer.bound == pytest.approx(float(g["mid.U_bound"]), rel=1e-12)


def test_gradients_of_every_parameter_equal_the_recurrence() -> None:
    torch.manual_seed(0)
    mixer = IndRNNMixer(5, bound=1.1, floor=0.0).double()
    torch.nn.init.normal_(mixer.input.bias)
    x = torch.randn(2, 11, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)
    y, expected = mixer(x, everything(x)), stepped(mixer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, *mixer.parameters())
    ours, others = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, expected))
    for own, other in zip(ours, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(IndRNNMixer(8, bound=5 ** (1 / 2048), floor=0.9), 8, rtol=1e-4, atol=1e-4)


def test_a_weight_outside_the_bound_acts_as_the_bound_and_can_return() -> None:
    """A descent that leads back inside is followed, one that leads further outside is not; nothing is written."""
    mixer = IndRNNMixer(2, bound=1.0, floor=0.0).double()
    with torch.no_grad():
        mixer.input.weight.copy_(torch.eye(2))
        mixer.u.copy_(torch.tensor([3.0, 3.0]))
    x = torch.ones(1, 3, 2, dtype=torch.float64)
    y = mixer(x, everything(x))
    torch.testing.assert_close(y[0, :, 0], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), rtol=0, atol=0)
    (y[..., 0].sum() - y[..., 1].sum()).backward()
    assert mixer.u.grad is not None
    # dy_2/du = h_1 = 1, dy_3/du = h_2 + u dy_2/du = 3
    assert mixer.u.grad.tolist() == [4.0, 0.0]
    assert mixer.u.tolist() == [3.0, 3.0]


def test_no_mixer_is_ten_times_as_large_as_another_at_any_length() -> None:
    rms = []
    for length in (1024, 4096, 16384):
        torch.manual_seed(0)
        x = torch.randn(1, length, 64)
        with torch.no_grad():
            for mixer in mixers(d_model=64, n_layers=3, length=length):
                rms.append(mixer(x, everything(x)).square().mean().sqrt().item())
    assert max(rms) < 10 * min(rms)


@pytest.mark.parametrize("holds", [False, True])
def test_the_last_layer_starts_with_long_memories_when_asked(holds: bool) -> None:
    torch.manual_seed(0)
    first, last = (mixer.u for mixer in mixers(d_model=256, n_layers=2, length=1000, last_holds=holds))
    bound = 5**0.001
    assert first.min() < 0.1
    assert last.min() >= 1 / bound if holds else last.min() < 0.1
    assert max(first.max(), last.max()) <= bound
    assert not any(mixer.input.bias.any() for mixer in mixers(d_model=4, n_layers=2, length=8))


def test_weight_decay_spares_the_recurrent_weights_biases_and_norms() -> None:
    encoder = IndRNN(d_model=4, n_layers=1, length=8)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    rest = {name for name, _ in encoder.named_parameters() if name.endswith("bias") or "norm" in name}
    assert own == {"layers.0.mixer.u"} | rest
    assert all(settings == {"weight_decay": 0.0} for settings in encoder.optim.values())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"gamma is 0\.5"):
        IndRNN(d_model=8, n_layers=1, length=8, gamma=0.5)
