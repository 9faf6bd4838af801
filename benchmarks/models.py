"""Encoders beside the same ones in other packages, where these are installed: what `python -m benchmarks models` times.

A peer is our own encoder with the other package's layer in the place of each mixer, so that norms, residuals and
feed-forward parts are the same on both sides; packages whose layers do not come apart are taken whole. Both train on
float32 inputs, a sixteenth of them padding where the peer takes a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers import installed
from lra.encoder import Encoder
from lra.errors import unknown
from lra.operators.bench import machine_columns, timing_columns
from lra.profiling import memory
from lra.profiling.timing import Timing, together
from lra.registry import architectures


@dataclass(frozen=True)
class Shape:
    """Of the inputs and the encoder on both sides."""

    batch: int
    length: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4


RECURRENT, ATTENTION = Shape(16, 1024), Shape(8, 2048)


class Taken(nn.Module):
    """Another package's layer in the place of a mixer. call: (layer, x, mask) -> y."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.call(self.layer, x, mask)

    def aux_loss(self) -> None:
        return None


def _plain(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x)


def _first(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x)[0]


def _masked(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x, mask=mask)


@dataclass(frozen=True)
class Peer:
    """package: what has to be importable. make, call: see Taken; whole: it stands for the encoder, not for a mixer."""

    name: str
    package: str
    make: Callable[[Shape], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Tensor] = _plain
    whole: bool = False

    def build(self, ours: Match) -> nn.Module:
        if self.whole:
            return Taken(self.make(ours.shape), self.call)
        encoder: Any = ours.build()
        for block in encoder.blocks:
            block.mixer = Taken(self.make(ours.shape), self.call)
        return encoder


@dataclass(frozen=True)
class Match:
    """An architecture of ours with the options that make it what its peers are."""

    architecture: str
    shape: Shape
    peers: tuple[Peer, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Encoder:
        s, make = self.shape, architectures.get(self.architecture)
        own = {"n_heads": s.n_heads} if "n_heads" in make.options() else {"direction": "causal"}
        return make(d_model=s.d_model, n_layers=s.n_layers, length=s.length, **own, **self.options)


class HalfGLU(nn.Module):
    """An S5 layer with the activation that ours has: g sigmoid(W g), g = gelu(y)."""

    def __init__(self, layer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.layer, self.gate = layer, nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        g = F.gelu(self.layer(x), approximate="tanh")
        return g * torch.sigmoid(self.gate(g))


def _mambapy(s: Shape) -> nn.Module:
    kit = import_module("mambapy.mamba")
    return kit.MambaBlock(kit.MambaConfig(d_model=s.d_model, n_layers=s.n_layers))


def _s5(state: int) -> Callable[[Shape], nn.Module]:
    return lambda s: HalfGLU(import_module("s5").S5(s.d_model, state), s.d_model)


def _performer(s: Shape) -> nn.Module:
    kit = import_module("performer_pytorch")
    return kit.SelfAttention(s.d_model, heads=s.n_heads, dim_head=s.d_model // s.n_heads, qkv_bias=True)


def _reformer(s: Shape) -> nn.Module:
    kit = import_module("reformer_pytorch")
    return kit.Reformer(dim=s.d_model, depth=s.n_layers, heads=s.n_heads, bucket_size=64, n_hashes=2)


def _reformed(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    # its reversible blocks need an input that has a gradient
    return layer(x.detach().requires_grad_(), input_mask=mask)


def _linformer(s: Shape) -> nn.Module:
    return import_module("linformer.linformer").LinformerSelfAttention(s.d_model, s.length, k=128, heads=s.n_heads)


def _nystrom(s: Shape) -> nn.Module:
    return import_module("nystrom_attention").NystromAttention(
        s.d_model, s.d_model // s.n_heads, s.n_heads, num_landmarks=64, residual_conv_kernel=35
    )


def _local(s: Shape) -> nn.Module:
    # window_size 64 with the neighbours on both sides, as `local/overlap` has them
    return import_module("local_attention.transformer").LocalMHA(
        dim=s.d_model, window_size=64, heads=s.n_heads, dim_head=s.d_model // s.n_heads, exact_windowsize=False
    )


def _huggingface(name: str, **more: Any) -> Callable[[Shape], nn.Module]:
    def build(s: Shape) -> nn.Module:
        transformers = import_module("transformers")
        config = getattr(transformers, f"{name}Config")(
            vocab_size=16, hidden_size=s.d_model, num_hidden_layers=s.n_layers, num_attention_heads=s.n_heads,
            intermediate_size=4 * s.d_model, max_position_embeddings=s.length + 2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, sep_token_id=2, **more,
        )  # fmt: skip
        return getattr(transformers, f"{name}Model")(config, add_pooling_layer=False)

    return build


def _embedded(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state


def _first_is_global(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    everywhere = torch.zeros_like(mask, dtype=torch.long)
    everywhere[:, 0] = 1
    return layer(inputs_embeds=x, attention_mask=mask.long(), global_attention_mask=everywhere).last_hidden_state


def _nn(kind: str) -> Peer:
    return Peer(
        f"torch.nn.{kind}", "torch", lambda s: getattr(nn, kind)(s.d_model, s.d_model, batch_first=True), _first
    )


def _s4(module: str, name: str, **more: Any) -> Peer:
    """The authors' single-file modules; their checkout has to be on the path."""
    package = f"models.s4.{module}"
    layer = lambda s: getattr(import_module(package), name)(s.d_model, d_state=64, transposed=False, **more)  # noqa: E731
    return Peer(f"state-spaces/s4 {name}", package, layer, _first)


MATCHES = (
    Match("mamba", RECURRENT, (Peer("mambapy", "mambapy", _mambapy),)),
    Match("s5", RECURRENT, (
        Peer("s5-pytorch", "s5", _s5(64)), Peer("s5-pytorch, as many modes", "s5", _s5(32)),
    )),
    Match("mingru", RECURRENT, (
        Peer("minGRU-pytorch", "minGRU_pytorch", lambda s: import_module("minGRU_pytorch").minGRU(s.d_model)),
    )),
    Match("lstm", RECURRENT, (_nn("LSTM"),)),
    Match("gru", RECURRENT, (_nn("GRU"),)),
    Match("elman", RECURRENT, (_nn("RNN"),)),
    Match("s4d", RECURRENT, (_s4("s4d", "S4D"),)),
    Match("s4", RECURRENT, (_s4("s4", "S4Block", final_act="glu"),)),
    Match("performer", ATTENTION, (Peer("performer-pytorch", "performer_pytorch", _performer, _masked),)),
    Match("reformer", ATTENTION, (Peer("reformer-pytorch", "reformer_pytorch", _reformer, _reformed, whole=True),)),
    Match("linformer", ATTENTION, (Peer("linformer", "linformer", _linformer),)),
    Match("nystromformer", ATTENTION, (Peer("nystrom-attention", "nystrom_attention", _nystrom, _masked),)),
    Match("local/overlap", ATTENTION, (Peer("local-attention", "local_attention", _local, _masked),), {"size": 64}),
    Match("longformer", ATTENTION, (
        Peer("Hugging Face Longformer", "transformers", _huggingface("Longformer", attention_window=512),
             _first_is_global, whole=True),
    )),
    Match("bigbird", ATTENTION, (
        Peer("Hugging Face BigBird", "transformers",
             _huggingface("BigBird", block_size=64, num_random_blocks=3), _embedded, whole=True),
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """name: "lra" or the peer's. step: one training step (forward, backward, AdamW)."""

    name: str
    parameters: int
    step: Callable[[], object]


def contestants(match: Match, device: torch.device) -> Iterator[Contestant]:
    """Ours first, then every peer that is installed."""
    s = match.shape
    torch.manual_seed(0)
    x = torch.randn(s.batch, s.length, s.d_model, device=device)
    mask = (torch.arange(s.length, device=device) < s.length - s.length // 16).expand(s.batch, -1)
    yield _contestant("lra", match.build().to(device), x, mask)
    for peer in match.peers:
        if installed(peer.package):
            yield _contestant(peer.name, peer.build(match).to(device), x, mask)


def _contestant(name: str, model: nn.Module, x: Tensor, mask: Tensor) -> Contestant:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        model(x, mask).square().mean().backward()
        optimizer.step()

    return Contestant(name, sum(p.numel() for p in model.parameters()), step)


@dataclass(frozen=True)
class Step:
    """One measurement of a training step. by: "lra" or another package."""

    architecture: str
    by: str
    shape: Shape
    parameters: int
    timing: Timing


def bench(
    names: Iterable[str], device: torch.device, *, budget: float = 10.0, seen: Callable[[str], None] = lambda _: None
) -> Iterator[Step]:
    """Training steps of our encoders in turns with those of other packages; all of MATCHES where no name is given.

    Raises UserError for an architecture that has no match.
    """
    known = {match.architecture: match for match in MATCHES}
    chosen = list(names) or list(known)
    for name in chosen:
        if name not in known:
            raise unknown("architecture with peers", name, known)
    memory.keep_freed()
    for name in chosen:
        seen(name)
        found = {c.name: c for c in contestants(known[name], device)}
        for by, timing in together({n: c.step for n, c in found.items()}, device, budget=budget).items():
            yield Step(name, by, known[name].shape, found[by].parameters, timing)


def frame(steps: Iterable[Step], device: torch.device) -> pd.DataFrame:
    """One measurement a row, with hardware and versions."""
    rows = [
        {
            "architecture": step.architecture, "by": step.by, **asdict(step.shape), "parameters": step.parameters,
            **timing_columns(step.timing), **machine_columns(device),
        }
        for step in steps
    ]  # fmt: skip
    return pd.DataFrame(rows)
