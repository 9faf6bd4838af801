"""Diagnosis of common mistakes in a layer, with the line of the mistake."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lra.conformance.context import CheckContext, inputs
from lra.encoder import Encoder
from lra.errors import user_line

SAME = 1e-4
"""Largest difference between float32 outputs that count as equal, over their largest magnitude."""


def mistake(context: CheckContext) -> str:
    """The mistake that explains what is wrong with an encoder or a wrapped layer; empty if it is none of these.

    A tuple instead of a tensor, sequence-first input, an inverted mask, tensors that stay on their device.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for recognise in (_tuple, _sequence_first, _inverted_mask, _fixed_device):
            # what cannot be built or run is reported by the checks, or by the run itself
            with suppress(Exception):
                if text := recognise(context):
                    return text
    return ""


def _layer(context: CheckContext) -> tuple[nn.Module, Callable[[Tensor, Tensor], Any]]:
    """The user's own module in a new encoder, and how it is called with x and mask."""
    encoder = context.encoder(torch.float32)
    mixer = next((m for m in encoder.modules() if hasattr(m, "inner") and hasattr(m, "takes_mask")), None)
    if mixer is None:
        return encoder, encoder
    inner: nn.Module = mixer.inner  # type: ignore[assignment]
    return inner, lambda x, mask: inner(x, mask=mask) if mixer.takes_mask else inner(x)


def _line(module: nn.Module) -> str:
    """File and line of a module's forward, as " (file.py:12)"."""
    with suppress(AttributeError):
        code = inspect.unwrap(type(module).forward).__code__
        return f" ({Path(code.co_filename).name}:{code.co_firstlineno})"
    return ""


def _tuple(context: CheckContext) -> str:
    module, call = _layer(context)
    y = call(*inputs([16, 16], 16, torch.float32))
    if isinstance(y, Tensor):
        return ""
    kind = f"a {type(y).__name__} of {len(y)}" if isinstance(y, tuple | list) else f"a {type(y).__name__}"
    return f"{type(module).__name__}.forward returned {kind}; return the tensor (B, L, D) alone{_line(module)}"


def _sequence_first(context: CheckContext) -> str:
    """Changes of one token reach other sequences of the batch, and no other token of its own."""
    module, call = _layer(context)
    x, mask = inputs([8, 8, 8], 8, torch.float32)
    before, changed = call(x, mask), x.clone()
    changed[1, 3] += 1.0
    moved = (call(changed, mask) - before).abs().amax(dim=-1) > SAME * before.abs().max()
    elsewhere = moved.clone()
    elsewhere[:, 3] = False
    moved[1] = False
    if not moved.any() or elsewhere.any():
        return ""
    return (
        f"{type(module).__name__} takes (L, B, D): it mixes the sequences of a batch instead of the tokens; inputs are "
        f"(B, L, D): set batch_first=True or transpose{_line(module)}"
    )


def _inverted_mask(context: CheckContext) -> str:
    """Outputs at real positions depend on the amount of padding, and do not where the mask is inverted."""
    encoder = context.encoder(torch.float32)
    if _ignores_padding(encoder, encoder):
        return ""
    mixers = [m for m in encoder.modules() if getattr(m, "takes_mask", False)]
    inverted: Callable[[Tensor, Tensor], Tensor] = encoder
    if mixers:
        for mixer in mixers:
            plain = mixer.forward
            mixer.forward = lambda x, mask, plain=plain: plain(x, ~mask)
    else:
        inverted = lambda x, mask: encoder(x, ~mask)  # noqa: E731
    if not _ignores_padding(encoder, inverted):
        return ""
    module, _ = _layer(context)
    return (
        "your mask is inverted: True = real token; PyTorch's key_padding_mask is the opposite, so pass ~mask"
        f"{_line(module)}"
    )


def _ignores_padding(encoder: Encoder, call: Callable[[Tensor, Tensor], Tensor]) -> bool:
    x, mask = inputs([17, 11], 32, torch.float32)
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    real = mask[:, :17]
    expected = call(x, mask)[:, :17][real]
    for total in (17, 20):
        y = call(x[:, :total], mask[:, :total])[:, :17][real]
        # NaN, as of a softmax over no key at all, is never equal
        if not (expected - y).abs().max() <= SAME * expected.abs().max():
            return False
    return True


def _fixed_device(context: CheckContext) -> str:
    """On the meta device, every tensor that is left behind on the CPU is noticed."""
    module, _ = _layer(context)
    if context.constructor.declared:
        return ""
    encoder = context.encoder(torch.float32).to("meta")
    x, mask = (t.to("meta") for t in inputs([16, 16], 16, torch.float32))
    try:
        encoder(x, mask)
    except RuntimeError as error:
        if (line := user_line(error)) and "device" in str(error):
            return (
                f"{type(module).__name__} makes a tensor that stays on the CPU: create it with device=x.device, or "
                f"give it to register_buffer{line}"
            )
    return ""
