"""Universal Transformer: one layer applied repeatedly, with a learned number of repetitions for each token.

Dehghani et al. 2018, arXiv:1807.03819. Layer f of attention and transition, at most T = n_layers steps t = 0, 1, ...;
P (L, D) and S (T, D) are sinusoids of position and step. x_0 is the input, y_0 = 0:

    u_t = x_t + P + S_t                                    (B, L, D)   section 2.1, equation 6
    p_t = sigmoid(w . u_t + b)                             (B, L)      halting probability (appendix C)
    x_{t+1} = f(u_t)                                       f: x = norm(x + attention(x)); x = norm(x + ffn(x))
    a token halts at the first t where p_0 + ... + p_t > 1 - epsilon; its weight there is the remainder,
    m_t = 1 - (p_0 + ... + p_{t-1});  m_t = p_t before, 0 after
    y_{t+1} = m_t x_{t+1} + (1 - m_t) y_t                  (B, L, D)   the output is y_T
    loss = ponder_weight * mean over tokens of (steps taken + remainder)

A token that never halts has no remainder. After it halted, its state goes on and is seen by others, while y keeps what
it was. Recurrent mode keeps keys and values of every step.

Initialisation: attention Xavier, as `transformer`; w Xavier uniform, b = 1, so that a token first takes about two
steps.

Departures: as the paper's listing (appendix C) and the authors' code, y discounts earlier steps by 1 - m_t, where
Graves 2016 sums m_t x_t, and states go on after halting, where section 2.2 copies them. All T steps are computed: the
work does not depend on the data, and y_T is the same.

Checked against: tensors of an independent implementation of the authors' code (output, remainders, steps, gradients);
the encoder written out token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import checked_width
from lra.architectures._checks import at_least
from lra.architectures._counts import added, unless_exporting
from lra.architectures._norm import normalised
from lra.architectures._precision import own_precision, wide
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Block, Stack, sinusoidal
from lra.encoder import Card, Cost, clean_padding


class Universal(Stack):
    """n_layers: T. halting: False: every token takes all steps, and the output is x_T. epsilon: of the halting
    threshold. ponder_weight: of the loss. n_heads: must divide d_model. attention_dropout: on the attention weights."""

    card = Card(
        title="Universal Transformers",
        year=2018,
        url="https://arxiv.org/abs/1807.03819",
        scaling="L^2",
        causal=False,
        variants={"fixed": {"halting": False}},
    )
    block = Block(prenorm=False, ffn="relu")
    places: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        halting: bool = True,
        epsilon: float = 0.1,
        ponder_weight: float = 0.01,
        attention_dropout: float = 0.0,
        **stack: Any,
    ) -> None:
        checked_width(d_model, n_heads, None, "none")
        at_least(1, n_layers=n_layers)
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon is {epsilon}; above 0 and below 1")
        super().__init__(
            lambda _: SoftmaxMixer(
                d_model, n_heads, width=d_model, positions="none", causal=direction == "causal",
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, n_layers=1, length=length, direction=direction, **stack,
        )  # fmt: skip
        self.n_layers, self.epsilon, self.ponder_weight = n_layers, epsilon, ponder_weight
        self.register_table("places", sinusoidal, length, d_model)
        self.register_table("steps", sinusoidal, n_layers, d_model)
        self.halt = nn.Linear(d_model, 1) if halting else None
        if self.halt is not None:
            nn.init.xavier_uniform_(self.halt.weight)
            nn.init.ones_(self.halt.bias)
        self.loss: Tensor | None = None
        self.counts: Tensor | None = None  # steps and ponder cost of all tokens, tokens that halted, tokens

    def __getstate__(self) -> dict[str, Any]:
        # the loss holds a graph, which no copy can take along
        return {**self.__dict__, "loss": None}

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        layer = self.blocks[0]
        return self.ponder(lambda u, _: layer(u, mask), self.enter(x), mask, 0)

    def ponder(self, advance: Callable[[Tensor, int], Tensor], x: Tensor, mask: Tensor, start: int) -> Tensor:
        """y of the equations: (B, L, D), whose first token stands at `start` -> (B, L, D). advance(u, t): f."""
        if start + x.shape[1] > len(self.places):
            raise ValueError(f"length {start + x.shape[1]} exceeds the {len(self.places)} positions this encoder has")
        places = self.places[start : start + x.shape[1]].to(x.dtype)
        y, running = torch.zeros_like(x), mask
        total = wide(x.new_zeros(mask.shape))
        updates, remainders = torch.zeros_like(total), torch.zeros_like(total)
        for t in range(self.n_layers):
            x = x + places + self.steps[t].to(x.dtype)
            if self.halt is None:
                y = x = advance(x, t)
                continue
            p = wide(own_precision(x, partial(self.halt, x))).squeeze(-1).sigmoid()
            halted = running & (total + p > 1 - self.epsilon)
            remainder = torch.where(halted, 1 - total, 0)
            updates, remainders = updates + running, remainders + remainder
            running = running & ~halted
            weight = torch.where(running, p, remainder)
            total = total + weight
            x = advance(x, t)
            y = torch.lerp(y, x, weight.unsqueeze(-1).to(x.dtype))
        if self.halt is not None:
            self.note(updates, remainders, running, mask)
        return normalised(self.norm, y, mask)

    @unless_exporting
    def note(self, updates: Tensor, remainders: Tensor, running: Tensor, mask: Tensor) -> None:
        """The loss of this forward, and its counts."""
        tokens = mask.sum()
        ponder = (updates + remainders).sum()
        self.loss = self.ponder_weight * ponder / tokens
        now = torch.stack([updates.sum(), ponder, tokens - running.sum(), tokens]).detach()
        self.counts = added(self.counts, now)

    def aux_loss(self) -> Tensor | None:
        losses = [loss for loss in (super().aux_loss(), self.loss) if loss is not None]
        return torch.stack(losses).sum() if losses else None

    def diagnostics(self) -> dict[str, float]:
        """`steps`: mean number of steps of a token; `ponder`: mean ponder cost, steps and remainder; `halted`: share of
        tokens that halted by themselves. Over the forwards since last asked."""
        found = super().diagnostics()
        if self.counts is not None:
            steps, ponder, halted, tokens = self.counts.tolist()
            found |= {"steps": steps / tokens, "ponder": ponder / tokens, "halted": halted / tokens}
            self.counts = None
        return found

    def cost(self, length: int) -> Cost:
        halting = Cost() if self.halt is None else Cost.linear(length, self.d_model, 1)
        return self.n_layers * (super().cost(length) + halting)

    def init_state(self, batch: int) -> Any:
        time, (own,) = super().init_state(batch)
        return time, (own,) * self.n_layers

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """State: the time, and keys and values of every step."""
        time, before = state
        layer, after, mask = self.blocks[0], [], x.new_ones(x.shape[:2], dtype=torch.bool)

        def advance(u: Tensor, t: int) -> Tensor:
            u, own = layer.chunk(u, before[t])
            after.append(own)
            return u

        y = self.ponder(advance, self.enter(x, time), mask, int(time))
        return y, (time + x.shape[1], tuple(after))
