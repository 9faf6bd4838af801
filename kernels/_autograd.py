"""Gradients of custom operators, for autograd, the compiler and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Any:
    """Register the gradient of a custom operator. Returns the function to call in place of `op`.

    backward, setup_context: as for `torch.library.register_autograd`. `torch.func` rejects what PyTorch generates
    from them ("must override the setup_context staticmethod"), so inside its transforms the operator is called
    through a Function that has one.
    """
    op.register_autograd(backward, setup_context=setup_context)
    parts = {"forward": op, "setup_context": setup_context, "backward": once_differentiable(backward)}
    function = type(f"{op._name}Function", (torch.autograd.Function,), {k: staticmethod(f) for k, f in parts.items()})

    def call(*arguments: Any) -> Any:
        # the first condition keeps the compiler from tracing the second
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)  # type: ignore[attr-defined]
        return op(*arguments)

    call.__wrapped__ = op  # type: ignore[attr-defined]
    return call
