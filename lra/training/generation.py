"""Text from a model of the next token: a prompt in one chunk, then token by token in the recurrent mode."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lra.errors import UserError, brief
from lra.model import Classifier


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: among the `top_k` most likely ones (0 = all), and of these among the fewest that together
    have the probability `top_p`. temperature: divides the logits; 0 takes the most likely token. Raises UserError."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {brief(self.temperature)}; at least 0")
        if type(self.top_k) is not int or self.top_k < 0:
            raise UserError(f"top_k is {brief(self.top_k)}; a whole number from 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {brief(self.top_p)}; above 0, at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each token: logits (vocabulary,) -> (vocabulary,)."""
        if self.temperature == 0:
            return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
        ordered, order = (logits / self.temperature).sort(descending=True)
        shares = ordered[: self.top_k or None].softmax(dim=0)
        # the first token is always kept
        kept = shares * (shares.cumsum(dim=0) - shares < self.top_p)
        return torch.zeros_like(logits).index_copy(0, order[: len(kept)], kept / kept.sum())


@dataclass(frozen=True)
class Generated:
    """text: without the prompt. tokens: how many were drawn. seconds: of drawing them, without those of the prompt.
    state_bytes: size of the recurrent state after the last of them."""

    text: str
    tokens: int
    seconds: float
    state_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@torch.inference_mode()
def generate(
    model: Classifier, prompt: Tensor, tokens: int, sampling: Sampling, seed: int
) -> tuple[Tensor, float, int]:
    """prompt: (n,) tokens -> (tokens,) drawn tokens, seconds without those of the prompt, bytes of state after the last
    token. Raises NotImplementedError if the encoder has no recurrent mode."""
    encoder, random = model.encoder, torch.Generator().manual_seed(seed)
    state = encoder.init_state(1)
    # tensors that all sequences share do not count
    shared = 2 * _size(state) - _size(encoder.init_state(2))
    y, state = encoder.chunk(model.embed(prompt.unsqueeze(0)), state)
    y, drawn, clock = y[:, -1], [], time.perf_counter()
    for _ in range(tokens):
        probabilities = sampling.probabilities(model.head(y)[0].float().cpu())
        drawn.append(torch.multinomial(probabilities, 1, generator=random))
        y, state = encoder.step(model.embed(drawn[-1].to(prompt.device).unsqueeze(0))[:, 0], state)
    return torch.cat(drawn), time.perf_counter() - clock, _size(state) - shared


def _size(state: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
