"""A trained model on sequences longer than those it was trained on, with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.encoder import Encoder, Mixer
from lra.errors import UserError
from lra.model import Classifier
from lra.training.construction import kept_random_state
from lra.training.execution import in_chunks

CARRIED, WHOLE = "state carried by chunk", "one forward pass"


class TooLong(UserError):
    """Why a model cannot read sequences of more tokens."""


class _Reading(nn.Module):
    """An encoder whose `forward` is another function of it."""

    def __init__(self, encoder: Encoder, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.read, self.d_model = encoder, read, encoder.d_model

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.read(x, mask)


@contextmanager
def reading(model: Classifier, trained: int, length: int, build: Callable[[int], Encoder]) -> Iterator[str]:
    """`model`, trained on sequences of `trained` tokens, reads up to `length` inside the block. Yields how: CARRIED, in
    pieces of `trained` tokens, where the encoder has a `chunk` of its own, otherwise WHOLE; "" where length <= trained.

    build(length): an encoder of the same settings for longer sequences; it takes over where tables, such as sinusoidal
    positions, end at `trained` tokens, if with the same weights it computes the same there. Raises TooLong, with the
    reason, where the weights are those of positions up to `trained`.
    """
    if length <= trained:
        yield ""
        return
    encoder, training = model.encoder, model.training
    model.eval()
    with torch.no_grad():
        way, read, chosen = _choose(encoder, trained, length, build)
    model.encoder = cast(Encoder, _Reading(chosen, read))
    try:
        yield way
    finally:
        model.encoder = encoder
        model.train(training)


def _choose(
    encoder: Encoder, trained: int, length: int, build: Callable[[int], Encoder]
) -> tuple[str, Callable[[Tensor, Tensor], Tensor], Encoder]:
    """The first way to read `length` tokens that works on a trial sequence."""
    device = next(encoder.parameters()).device
    reasons: list[str] = []
    for candidate in (lambda: encoder, lambda: _extended(encoder, trained, build(length).to(device).eval())):
        with kept_random_state():
            other = candidate()
        if other is None:
            continue
        x, mask = torch.zeros(1, length, encoder.d_model, device=device), torch.ones(1, length, device=device).bool()
        for way, read in _ways(other, trained):
            try:
                read(x, mask)
            except (ValueError, IndexError, RuntimeError) as error:
                reasons.append(str(error).strip().partition("\n")[0])
            else:
                return way, read, other
    raise TooLong(reasons[0])


def _ways(encoder: Encoder, trained: int) -> list[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """The ways to try, the best first: a `chunk` that calls `step` for each token is slower than a forward pass."""
    whole: tuple[str, Any] = (WHOLE, encoder.forward)
    try:
        encoder.init_state(1)
    except NotImplementedError:
        return [whole]
    carried: tuple[str, Any] = (CARRIED, partial(in_chunks, encoder, trained))
    parts = [part for part in encoder.modules() if isinstance(part, Encoder | Mixer)]
    slow = any(type(part).chunk in (Encoder.chunk, Mixer.chunk) for part in parts)
    return [whole, carried] if slow else [carried, whole]


def _extended(encoder: Encoder, trained: int, longer: Encoder) -> Encoder | None:
    """`longer` with the weights of `encoder`; None where it does not compute the same of `trained` tokens."""
    try:
        longer.load_state_dict(encoder.state_dict())
    except RuntimeError:
        return None
    x = torch.randn(1, trained, encoder.d_model, device=next(encoder.parameters()).device)
    mask = torch.ones_like(x[..., 0]).bool()
    return longer if torch.allclose(encoder(x, mask), longer(x, mask), rtol=1e-3, atol=1e-4) else None
