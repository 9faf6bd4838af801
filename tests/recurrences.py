"""Recurrent mixers against stored tensors: the whole sequence and token by token, from a given state."""

from __future__ import annotations

from typing import Any

import torch
from stepping import run
from torch import Tensor, nn
from torch.nn import functional as F


def padded(t: Tensor, *shape: int) -> Tensor:
    """`t` with zeros behind it in every dimension, for a stored layer that takes fewer features than it puts out."""
    return F.pad(t, [n for size, wanted in zip(t.shape[::-1], shape[::-1], strict=True) for n in (0, wanted - size)])


def load(mixer: nn.Module, **values: Tensor) -> None:
    """Copy values into parameters; underscores in pairs stand for dots. Every parameter must be given."""
    given = {name.replace("__", "."): value for name, value in values.items()}
    wanted = {name: parameter.shape for name, parameter in mixer.named_parameters()}
    assert {name: value.shape for name, value in given.items()} == wanted
    with torch.no_grad():
        for name, value in given.items():
            mixer.get_parameter(name).copy_(value)


def agrees(mixer: Any, g: dict[str, Tensor], state: Any, y: float = 1e-9, grad: float = 1e-9) -> Any:
    """Compare outputs and the gradient of x, of the whole sequence and token by token from `state`, with those stored;
    `y` and `grad` are absolute tolerances. Returns the state after the last token."""
    x = padded(g["x"], *g["x"].shape[:2], mixer.d_model).requires_grad_()
    mask, own = torch.ones(x.shape[:2], dtype=torch.bool), mixer.init_state
    mixer.init_state = lambda batch: state
    stepped, last = run(mixer, x)
    for out in (mixer(x, mask), stepped):
        out = out[..., : g["y"].shape[-1]]
        torch.testing.assert_close(out, g["y"], rtol=0, atol=y)
        (grad_x,) = torch.autograd.grad((out * g["w"]).sum(), x)
        torch.testing.assert_close(grad_x[..., : g["x"].shape[-1]], g["grad.x"], rtol=0, atol=grad)
    mixer.init_state = own
    return last


def same_gradients(mixer: Any, x: Tensor, expected: Tensor) -> None:
    """The mixer's output and all its gradients equal those of `expected`, computed from x and the same parameters."""
    y = mixer(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    w, inputs = torch.randn_like(y), (x, *mixer.parameters())
    ours, others = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, expected))
    for own, other in zip(ours, others, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)
