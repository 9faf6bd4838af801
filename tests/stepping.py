"""The recurrent mode written out: one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run(part: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """What a mixer or encoder puts out step by step, from `state` or from its first: (B, L, D) -> (B, L, D), and the
    state after the last token."""
    state, outputs = part.init_state(len(x)) if state is None else state, []
    for token in x.unbind(1):
        y, state = part.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def stepped(part: Any, x: Tensor) -> Tensor:
    return run(part, x)[0]


def assert_steps_equal_forward(part: Any, width: int, **tolerance: Any) -> None:
    """`step` and `forward` put out the same for 2,048 drawn tokens. part: a mixer or encoder in float32."""
    x = torch.randn(1, 2048, width)
    with torch.no_grad():
        forward = part(x, torch.ones(1, 2048, dtype=torch.bool))
        torch.testing.assert_close(stepped(part, x), forward, **tolerance)
