"""Encoders broken on purpose. `breaks` names the one check that each must fail; `Good` passes all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from bad_functions import OldStyle, ReadTwice, Uphill
from torch import Tensor, nn

from lra.encoder import Card, Cost, Encoder, Mixer, clean_padding
from lra.kernels.linear_scan import linear_scan

CARD = Card(title="A leaky mean", year=2000, url="https://example.org/paper", scaling="L", causal=True)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Good(Encoder):
    """x = x + m with m_t = a m_(t-1) + (1 - a) (W_2 gelu(W_1 norm(x_t) + b_1) + b_2), in each layer."""

    breaks: ClassVar[str] = ""
    card = CARD

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_model, self.n_layers, self.length = d_model, n_layers, length
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
            for _ in range(n_layers)
        )
        self.rates = nn.Parameter(torch.randn(n_layers, d_model))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mix(clean_padding(x, mask)[0])

    def mix(self, x: Tensor) -> Tensor:
        for layer, (norm, inner) in enumerate(zip(self.norms, self.maps, strict=True)):
            a = self.rates[layer].sigmoid()
            x = x + linear_scan(a[None, None], (1 - a) * inner(norm(x)))
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """What forward and step both end with: (..., D) -> (..., D)."""
        return x

    def cost(self, length: int) -> Cost:
        d = self.d_model
        return self.n_layers * (Cost.linear(length, d, 4 * d) + Cost.linear(length, 4 * d, d))

    def init_state(self, batch: int) -> Any:
        return (self.rates.new_zeros(batch, self.d_model),) * self.n_layers

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        after = []
        for layer, (norm, inner, mean) in enumerate(zip(self.norms, self.maps, state, strict=True)):
            a = self.rates[layer].sigmoid()
            after.append(a * mean + (1 - a) * inner(norm(x)))
            x = x + after[-1]
        return self.finish(x), tuple(after)


class TakesAnything(Good):
    breaks = "signature"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0, **more: Any) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)


class Positional(Good):
    breaks = "signature"

    def __init__(self, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)


class NoDropout(Good):
    breaks = "signature"

    def __init__(self, *, d_model: int, n_layers: int, length: int) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)


class ForgetsItsLength(Good):
    breaks = "signature"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.length = 512


class BadUrl(Good):
    breaks = "card"
    card = replace(CARD, url="arxiv 2000.00001")


class TwoScalings(Good):
    breaks = "card"
    card = replace(CARD, scaling="L^2")
    scaling = property(lambda _: "L")


class UnknownExemption(Good):
    breaks = "card"
    card = replace(CARD, exempt={"paddin": "reads it"})


class BrokenVariant(Good):
    breaks = "card"
    card = replace(CARD, variants={"wide": {"widht": 4}})


class LosesTheTimeAxis(Good):
    breaks = "shape"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).squeeze(1)


class NotFiniteFor33Tokens(Good):
    breaks = "shape"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) * (math.nan if x.shape[1] == 33 else 1)


class ReadsPadding(Good):
    """By a factor that starts at zero."""

    breaks = "padding"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        held = x.masked_fill(mask.unsqueeze(-1), 0).nan_to_num().abs().amax(dim=1, keepdim=True)
        bias = self.norms[0].bias
        assert isinstance(bias, Tensor)
        return super().forward(x, mask) + bias * held


class CountsPadding(Good):
    breaks = "padding_length"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) * mask.to(x.dtype).mean(dim=1)[:, None, None]


class BatchNorm(Good):
    """In training less the mean over the batch."""

    breaks = "batch"

    def finish(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.flatten(0, -2).mean(0) if self.training else x


class KnowsItsRow(Good):
    breaks = "batch"

    def finish(self, x: Tensor) -> Tensor:
        row = torch.arange(len(x), dtype=x.dtype)
        return x + 0.1 * row.view(-1, *[1] * (x.dim() - 1))


class DeadParameter(Good):
    breaks = "gradients"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.unused = nn.Parameter(torch.randn(d_model))


class WildGradient(Good):
    """The square root of something that is zero: its slope is infinite, and infinity times zero is NaN."""

    breaks = "gradients"

    def finish(self, x: Tensor) -> Tensor:
        return x + 0 * (self.rates[0] - self.rates[0].detach()).abs().sqrt() * x.detach() if self.wild(x) else x

    def wild(self, x: Tensor) -> bool:
        # as the check of gradients calls it, and none of the others that take some
        return self.training and x.dtype == torch.float64 and len(x) == 3


class PeeksAhead(Good):
    breaks = "causal"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        ahead = x.masked_fill(~mask.unsqueeze(-1), 0)[:, 1:]
        return super().forward(x, mask) + torch.cat([ahead, torch.zeros_like(x[:, :1])], dim=1)

    def init_state(self, batch: int) -> Any:
        raise NotImplementedError


class NeverLooksAhead(Good):
    breaks = "causal"
    direction = "bidirectional"


class Directed(Good):
    """A second direction: the embedding of the next token is added."""

    refused: ClassVar[str] = ""

    def __init__(
        self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0, direction: str = "causal"
    ) -> None:
        if direction == self.refused or direction not in ("causal", "bidirectional"):
            raise ValueError(f"direction is {direction!r}")
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.direction = direction

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = super().forward(x, mask)
        return y if self.causal else y + self.ahead(x, mask)

    def ahead(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([x.masked_fill(~mask.unsqueeze(-1), 0)[:, 1:], torch.zeros_like(x[:, :1])], dim=1)

    def init_state(self, batch: int) -> Any:
        if not self.causal:
            raise NotImplementedError
        return super().init_state(batch)


class RefusesCausal(Directed):
    breaks = "causal"
    refused = "causal"

    def __init__(
        self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0, direction: str = "bidirectional"
    ) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length, direction=direction)


class OneWayOnly(Directed):
    breaks = "causal"

    def ahead(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(x)


class LeaksOnTheWayBack(Directed):
    """Right by default, wrong in the other direction."""

    breaks = "padding"

    def ahead(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([x[:, 1:].nan_to_num(), torch.zeros_like(x[:, :1])], dim=1)


class StepsDifferently(Good):
    breaks = "step"

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().step(x, tuple(2 * mean for mean in state))


class ForgetsBetweenChunks(Good):
    breaks = "step"

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().chunk(x, self.init_state(len(x)))


class DoubledCost(Good):
    breaks = "cost"

    def cost(self, length: int) -> Cost:
        return 2 * super().cost(length)


class ForgottenWork(Good):
    """Its products are declared, its Fourier transform, which is most of the work, is not."""

    breaks = "cost"

    def finish(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(wide(x.detach()).repeat(*[1] * (x.dim() - 1), 512)).real
        return x + 0 * waves[..., : x.shape[-1]].to(x.dtype)


class ChargedToEverySequence(Good):
    """A transform of its parameters, done once for a batch."""

    breaks = "cost"

    def finish(self, x: Tensor) -> Tensor:
        return x + 0 * torch.fft.rfft(wide(self.rates.detach()[0]).repeat(4096)).real[: x.shape[-1]].to(x.dtype)

    def cost(self, length: int) -> Cost:
        return super().cost(length) + Cost(other=2.5 * 4096 * self.d_model * math.log2(4096 * self.d_model))


class OverstatedGrowth(Good):
    breaks = "cost"
    card = replace(CARD, scaling="L^2")


class UnsavedNumber(Good):
    """Drawn first, and on the CPU: the same again for one seed, on the meta device too."""

    breaks = "save"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        drawn = torch.rand((), device="cpu").item()
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.shift = drawn

    def finish(self, x: Tensor) -> Tensor:
        return x + self.shift


class CannotBeCopied(Good):
    breaks = "copies"

    def finish(self, x: Tensor) -> Tensor:
        return x * getattr(self, "scale", 1.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> CannotBeCopied:
        twin = type(self)(d_model=self.d_model, n_layers=self.n_layers, length=self.length).to(self.rates.dtype)
        twin.load_state_dict(self.state_dict())
        twin.scale = 2.0  # type: ignore[assignment]
        return twin


def autocasts(dtype: torch.dtype) -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype


class LosesBits(Good):
    breaks = "precision"

    def finish(self, x: Tensor) -> Tensor:
        y = x.bfloat16() if autocasts(torch.bfloat16) else wide(x)
        return ((y + 300) - 300).to(x.dtype)


class Overflows(Good):
    breaks = "precision"

    def finish(self, x: Tensor) -> Tensor:
        large = (x.half() if autocasts(torch.bfloat16) else x) * 1e5
        return large / 1e5


class OverflowsInFloat16(Good):
    """By a constant that bfloat16 can hold."""

    breaks = "float16"

    def finish(self, x: Tensor) -> Tensor:
        large = (x.half() if autocasts(torch.float16) else x) * 1e5
        return large / 1e5


class IdlePattern(Good):
    breaks = "optim"

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"*.log_dt": {"lr": 1e-3}}


class ShadowedPattern(Good):
    breaks = "optim"

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"*": {"weight_decay": 0.0}, "rates": {"lr": 1e-3}}


class MisspeltSetting(Good):
    breaks = "optim"

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"rates": {"learning_rate": 1e-3}}


class Stepping(Good):
    """With a step size for each channel, spared with its norms and biases from weight decay."""

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.log_dt = nn.Parameter(torch.zeros(d_model))

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {pattern: {"weight_decay": 0.0} for pattern in ("log_dt", "norms.*", "*.bias")}

    def finish(self, x: Tensor) -> Tensor:
        return x * self.log_dt.exp()


class DecaysItsSteps(Stepping):
    breaks = "optim_groups"

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {pattern: settings for pattern, settings in super().optim.items() if pattern != "log_dt"}


class DecaysItsNorms(Stepping):
    breaks = "optim_norms"

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {pattern: settings for pattern, settings in super().optim.items() if pattern != "norms.*"}


class Sum(Mixer):
    """Of all magnitudes so far: it grows with the length."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.abs().cumsum(1)

    def cost(self, length: int) -> Cost:
        return Cost()


class GrowsWithTheLength(Good):
    breaks = "magnitudes"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.sum = Sum()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) + 1e-3 * self.sum(x, mask)

    def init_state(self, batch: int) -> Any:
        raise NotImplementedError


class GrowsWithTheDepth(Good):
    """Without mixers: what the whole encoder puts out is measured."""

    breaks = "magnitudes"

    def finish(self, x: Tensor) -> Tensor:
        return x * 12.0 ** (self.n_layers // 4)


class LearnsBackwards(Good):
    breaks = "trains"

    def finish(self, x: Tensor) -> Tensor:
        return Uphill.apply(x)


class OwnRandomness(Good):
    breaks = "seed"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.rates = nn.Parameter(torch.from_numpy(np.random.default_rng().normal(size=(n_layers, d_model))).float())


class OwnNoise(Good):
    """Noise of numpy's own, too small to move any output that is compared up to rounding."""

    breaks = "seed"

    def finish(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(1e-11 * np.random.default_rng().normal(size=x.shape)).to(x.dtype)


class MultipliesNaN(Good):
    breaks = "padding_nan"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask) + 0 * (x * mask.unsqueeze(-1)).sum(1, keepdim=True)


class DividesByTheLength(Good):
    """0 / 0 in a row of padding alone."""

    breaks = "padding_row"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1).view(-1, 1, 1).to(x.dtype)
        return super().forward(x, mask) * (count / count)


class AcceptsLeftPadding(Good):
    breaks = "padding_left"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mix(x.masked_fill(~mask.unsqueeze(-1), 0))


class MeasuresTheSpread(Good):
    """The root of a variance, which is zero for one token: its slope is infinite."""

    breaks = "one_token"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = super().forward(x, mask)
        return y + 0 * (y - y.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()


class ReadsSavedTensorsTwice(Good):
    breaks = "checkpointing"

    def finish(self, x: Tensor) -> Tensor:
        return ReadTwice.apply(x, torch.ones_like(x))


class LosesItsTable(Good):
    """A table that is the same in every process, and in no state dict."""

    breaks = "meta"
    ramp: Tensor

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.register_buffer("ramp", torch.linspace(0, 1, d_model), persistent=False)

    def finish(self, x: Tensor) -> Tensor:
        return x + self.ramp


class HoldsAFunction(Good):
    breaks = "copies"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        super().__init__(d_model=d_model, n_layers=n_layers, length=length)
        self.finish = lambda x: 2 * x  # type: ignore[method-assign]


class HasNoSetupContext(Good):
    breaks = "functional"

    def finish(self, x: Tensor) -> Tensor:
        return OldStyle.apply(x)


class KeepsATensor(Good):
    """Of the first forward pass: under inference_mode, one that no gradient can pass."""

    breaks = "inference"
    kept: Tensor | None = None

    def finish(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        return x * self.kept


class ReturnsSingle(Good):
    breaks = "bfloat16"

    def finish(self, x: Tensor) -> Tensor:
        return wide(x)


class DiffersWhenCompiled(Good):
    breaks = "compiles"

    def finish(self, x: Tensor) -> Tensor:
        return 2 * x if torch.compiler.is_dynamo_compiling() else x


class ReadsValues(Good):
    """A branch on what a tensor holds: the compiler runs it between two graphs, an exported graph cannot."""

    breaks = "exports"

    def finish(self, x: Tensor) -> Tensor:
        return x if x.is_meta or x.sum() > -math.inf else 2 * x


class StaleExemption(Good):
    breaks = "padding"
    card = replace(CARD, exempt={"padding": "it reads the padding"})


class HonestExemption(ReadsPadding):
    breaks = ""
    card = replace(CARD, exempt={"padding": "it reads the padding"})


class CannotBeBuilt(Good):
    breaks = "signature"

    def __init__(self, *, d_model: int, n_layers: int, length: int, dropout: float = 0.0) -> None:
        raise RuntimeError("no such thing")
