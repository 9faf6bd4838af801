"""delta_elman against float64 loops over the equations of every step, torch.nn.RNN, and step 4 against step 3."""

from __future__ import annotations

import pytest
import torch
from recurrences import same_gradients
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures._logspace import add, to_linear, to_log
from lra.architectures.recurrent.delta_elman import STEPS, DeltaElman, DeltaElmanMixer


def equations(mixer: DeltaElmanMixer, x: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(x[:, 0]), []
    for token in x.unbind(1):
        turned = torch.diag(mixer.r_h) @ h.T if mixer.r_h is not None else mixer.get_parameter("W_h") @ h.T
        candidate = torch.tanh(mixer.W_x(token) + turned.T)
        delta = torch.sigmoid(mixer.W_delta(token)) if mixer.W_delta is not None else 1
        h = (1 - delta) * h + delta * candidate
        y = h
        if mixer.W_out is not None:
            groups = [torch.softmax(units, dim=-1) for units in h.split(mixer.group, dim=-1)]
            v = h @ mixer.W_out.weight.T
            y = torch.cat(groups, dim=-1) * v * torch.sigmoid(v)
        outputs.append(y)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("step", STEPS)
def test_output_and_every_gradient_equal_the_equations(step: int) -> None:
    torch.manual_seed(0)
    mixer = DeltaElmanMixer(6, step, group=3, horizon=5).double()
    torch.nn.init.normal_(mixer.W_x.bias)
    x = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)
    same_gradients(mixer, x, equations(mixer, x))
    torch.testing.assert_close(stepped(mixer, x), equations(mixer, x), rtol=0, atol=1e-12)


def test_step_0_equals_torch() -> None:
    torch.manual_seed(0)
    mixer, theirs = DeltaElmanMixer(6, 0, group=3, horizon=5).double(), torch.nn.RNN(6, 6, batch_first=True).double()
    values = (mixer.W_x.weight, mixer.W_h, mixer.W_x.bias, torch.zeros(6, dtype=torch.float64))
    with torch.no_grad():
        for parameter, value in zip(theirs.parameters(), values, strict=True):
            parameter.copy_(value)  # type: ignore[arg-type]
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, torch.ones(2, 9, dtype=torch.bool)), theirs(x)[0], rtol=0, atol=1e-12)


def test_sums_of_logarithms() -> None:
    a, b = torch.randn(2, 100, dtype=torch.float64)
    torch.testing.assert_close(to_linear(add(to_log(a), to_log(b))), a + b, rtol=0, atol=1e-14)
    cancelled = add(to_log(a), to_log(-a))
    assert cancelled[0].isfinite().all()
    assert to_linear(cancelled).abs().max() < 1e-14


@torch.no_grad()
def test_step_4_holds_what_a_float_does_not() -> None:
    """States of exp(-500) stay apart where nothing comes in; in float32 they are zero."""
    mixer = DeltaElmanMixer(4, 4, group=2, horizon=2)
    assert mixer.W_delta is not None
    mixer.W_delta.weight.zero_()
    mixer.W_delta.bias.fill_(-1000.0)
    log, sign = torch.tensor([[-500.0, -501.0, -502.0, -503.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    _, (after, signs) = mixer.chunk(torch.randn(1, 5, 4), (log, sign))
    torch.testing.assert_close(after, log)
    torch.testing.assert_close(signs, sign)


test_wrong_arguments_are_named = refuses(DeltaElman, d_model=8, n_layers=1, length=16)(
    ({"step": 5}, "step is 5"),
    ({"group": 3}, "group is 3"),
    ({"horizon": 0}, "horizon is 0"),
)
