"""log_elman against the same recurrence in linear space."""

from __future__ import annotations

import torch
from recurrences import same_gradients
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.recurrent.log_elman import LogElman, LogElmanMixer


def equations(mixer: LogElmanMixer, x: Tensor, h: Tensor) -> Tensor:
    outputs = []
    for token in x.unbind(1):
        delta = torch.sigmoid(mixer.W_delta(token))
        h = (1 - delta) * h + delta * torch.tanh(mixer.W_x(token) + h @ mixer.W_h.T)
        groups = [torch.softmax(units, dim=-1) for units in h.split(mixer.group, dim=-1)]
        v = h @ mixer.W_out.weight.T
        outputs.append(torch.cat(groups, dim=-1) * v * torch.sigmoid(v))
    return torch.stack(outputs, 1)


def test_output_and_every_gradient_equal_linear_space() -> None:
    torch.manual_seed(0)
    mixer = LogElmanMixer(6, group=3, horizon=5).double()
    torch.nn.init.normal_(mixer.W_x.bias)
    x = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)
    expected = equations(mixer, x, torch.zeros(2, 6, dtype=torch.float64))
    same_gradients(mixer, x, expected)
    torch.testing.assert_close(stepped(mixer, x), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_product_of_states_that_a_float_does_not_hold() -> None:
    """States of exp(-500) stay apart where nothing comes in; their product with W_h is zero, not a NaN."""
    mixer = LogElmanMixer(4, group=2, horizon=2)
    mixer.W_delta.weight.zero_()
    mixer.W_delta.bias.fill_(-1000.0)
    log, sign = torch.tensor([[-500.0, -501.0, -502.0, -503.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    _, (after, signs) = mixer.chunk(torch.randn(1, 5, 4), (log, sign))
    torch.testing.assert_close(after, log)
    torch.testing.assert_close(signs, sign)


test_wrong_arguments_are_named = refuses(LogElman, d_model=8, n_layers=1, length=16)(
    ({"group": 3}, "group is 3"),
    ({"horizon": 0}, "horizon is 0"),
)
