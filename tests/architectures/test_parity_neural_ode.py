"""neural_ode against tensors of torchdiffeq and torch.nn.GRUCell: three methods at irregular times, every gradient."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import load, padded
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.recurrent.neural_ode import NeuralODE, NeuralODEMixer


def loaded(g: dict[str, Tensor], method: str) -> tuple[NeuralODEMixer, Tensor]:
    """The mixer, and the times of the tokens, which its gradient reaches."""
    mixer = NeuralODEMixer(4, 5, method, int(g["cfg.steps"])).double()
    own = {key.removeprefix("param.").replace(".", "__"): v for key, v in g.items() if key.startswith("param.")}
    load(mixer, **{**own, "cell__weight_ih": padded(own["cell__weight_ih"], 12, 4)})
    times = g["in.t"].clone().requires_grad_()
    spans = torch.cat([times[:1] * 0 + 5, times.diff()])  # whatever time came before the first token has no effect
    asked = iter(spans)

    def elapsed(x: Tensor) -> Tensor:
        return (spans if x.shape[1] > 1 else next(asked)[None]).expand(len(x), -1).unsqueeze(-1)

    mixer.elapsed = elapsed  # type: ignore[method-assign]
    return mixer, times


def test_layer_and_every_gradient_equal_torchdiffeq() -> None:
    g = golden("ode_rnn_rk4")
    for stepwise in (False, True):
        mixer, times = loaded(g, "rk4")
        x = padded(g["x"], 2, 7, 4).requires_grad_()
        y = stepped(mixer, x) if stepwise else mixer(x, torch.ones(2, 7, dtype=torch.bool))
        torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
        (y * g["w"]).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad[..., :3], g["grad.x"], rtol=0, atol=1e-10)
        torch.testing.assert_close(times.grad, g["grad.t"], rtol=0, atol=1e-10)
        for name, parameter in mixer.named_parameters():
            grad = parameter.grad
            assert grad is not None
            if name == "cell.weight_ih":
                grad = grad[:, :3]
            torch.testing.assert_close(grad, g[f"grad.param.{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_other_methods_equal_torchdiffeq(method: str) -> None:
    g = golden("ode_rnn_rk4")
    mixer, _ = loaded(g, method)
    y = mixer(padded(g["x"], 2, 7, 4), torch.ones(2, 7, dtype=torch.bool))
    torch.testing.assert_close(y, g[f"mid.y_{method}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order_of_convergence(method: str, order: int) -> None:
    """Half the step, 2^order times less error."""
    torch.manual_seed(0)
    x, mask = torch.randn(1, 2, 4, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)

    def last(steps: int) -> Tensor:
        torch.manual_seed(1)
        mixer = NeuralODEMixer(4, 8, method, steps).double()
        torch.nn.init.normal_(mixer.get_parameter("net.2.weight"), std=0.5)
        return mixer(x, mask)[0, 1]

    exact = last(512)
    errors = [(last(steps) - exact).norm().item() for steps in (4, 8)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


test_wrong_arguments_are_named = refuses(NeuralODE, d_model=8, n_layers=1, length=16)(
    ({"method": "rk5"}, "euler, midpoint, rk4"),
    ({"steps": 0}, "steps is 0"),
)
