"""Training steps of encoders, compared with installed packages that implement them: `python -m benchmarks models`.

A peer is our encoder with the layers of another package as mixers, so that norms, residuals and feed-forward layers are
the same in both. A package without separate layers replaces the whole encoder. Inputs are float32; the last sixteenth
of each sequence is masked as padding.
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
    """Sizes of the inputs and of the encoder, the same for ours and the peers."""

    batch: int
    length: int
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4


RECURRENT, ATTENTION = Shape(16, 1024), Shape(8, 2048)


class PeerLayer(nn.Module):
    """A layer of another package with the interface of a mixer. call: (layer, x, mask) -> y."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.call(self.layer, x, mask)

    def aux_loss(self) -> None:
        return None


def _call(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x)


def _call_first(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x)[0]


def _call_masked(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x, mask=mask)


@dataclass(frozen=True)
class Peer:
    """Another implementation. package: module that must be importable; make: builds its layer; call: see PeerLayer;
    is_encoder: the layer replaces the encoder instead of each mixer."""

    name: str
    package: str
    make: Callable[[Shape], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor], Tensor] = _call
    is_encoder: bool = False

    def build(self, ours: Match) -> nn.Module:
        if self.is_encoder:
            return PeerLayer(self.make(ours.shape), self.call)
        encoder: Any = ours.build()
        for block in encoder.blocks:
            block.mixer = PeerLayer(self.make(ours.shape), self.call)
        return encoder


@dataclass(frozen=True)
class Match:
    """An architecture, its peers, and the options with which it computes the same as they do."""

    architecture: str
    shape: Shape
    peers: tuple[Peer, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Encoder:
        s, constructor = self.shape, architectures.get(self.architecture)
        extra = {"n_heads": s.n_heads} if "n_heads" in constructor.options() else {"direction": "causal"}
        return constructor(d_model=s.d_model, n_layers=s.n_layers, length=s.length, **extra, **self.options)


class HalfGLU(nn.Module):
    """An S5 layer followed by the activation of our S5: g sigmoid(W g), g = gelu(y)."""

    def __init__(self, layer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.layer, self.gate = layer, nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        g = F.gelu(self.layer(x), approximate="tanh")
        return g * torch.sigmoid(self.gate(g))


def _mambapy(s: Shape) -> nn.Module:
    mamba = import_module("mambapy.mamba")
    return mamba.MambaBlock(mamba.MambaConfig(d_model=s.d_model, n_layers=s.n_layers))


def _s5(state: int) -> Callable[[Shape], nn.Module]:
    return lambda s: HalfGLU(import_module("s5").S5(s.d_model, state), s.d_model)


def _performer(s: Shape) -> nn.Module:
    package = import_module("performer_pytorch")
    return package.SelfAttention(s.d_model, heads=s.n_heads, dim_head=s.d_model // s.n_heads, qkv_bias=True)


def _reformer(s: Shape) -> nn.Module:
    package = import_module("reformer_pytorch")
    return package.Reformer(dim=s.d_model, depth=s.n_layers, heads=s.n_heads, bucket_size=64, n_hashes=2)


def _call_reformer(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    # its reversible blocks need an input that requires a gradient
    return layer(x.detach().requires_grad_(), input_mask=mask)


def _linformer(s: Shape) -> nn.Module:
    return import_module("linformer.linformer").LinformerSelfAttention(s.d_model, s.length, k=128, heads=s.n_heads)


def _nystrom(s: Shape) -> nn.Module:
    return import_module("nystrom_attention").NystromAttention(
        s.d_model, s.d_model // s.n_heads, s.n_heads, num_landmarks=64, residual_conv_kernel=35
    )


def _local(s: Shape) -> nn.Module:
    # windows of 64 that also attend to both neighbours, as in `local/overlap`
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


def _call_embedded(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state


def _call_longformer(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    global_mask = torch.zeros_like(mask, dtype=torch.long)
    global_mask[:, 0] = 1
    return layer(inputs_embeds=x, attention_mask=mask.long(), global_attention_mask=global_mask).last_hidden_state


def _nn(kind: str) -> Peer:
    return Peer(
        f"torch.nn.{kind}", "torch", lambda s: getattr(nn, kind)(s.d_model, s.d_model, batch_first=True), _call_first
    )


def _s4(module: str, name: str, **more: Any) -> Peer:
    """The authors' single-file modules. Their checkout must be on the Python path."""
    package = f"models.s4.{module}"
    layer = lambda s: getattr(import_module(package), name)(s.d_model, d_state=64, transposed=False, **more)  # noqa: E731
    return Peer(f"state-spaces/s4 {name}", package, layer, _call_first)


MATCHES = (
    Match("mamba", RECURRENT, (Peer("mambapy", "mambapy", _mambapy),)),
    Match("s5", RECURRENT, (
        Peer("s5-pytorch", "s5", _s5(64)), Peer("s5-pytorch, as many modes", "s5", _s5(32)),
    )),
    Match("mingru", RECURRENT, (
        Peer("minGRU-pytorch", "minGRU_pytorch", lambda s: import_module("minGRU_pytorch").minGRU(s.d_model)),
    )), Match("lstm", RECURRENT, (_nn("LSTM"),)), Match("gru", RECURRENT, (_nn("GRU"),)), Match("elman", RECURRENT,
    (_nn("RNN"),)), Match("s4d", RECURRENT, (_s4("s4d", "S4D"),)), Match("s4", RECURRENT, (_s4("s4", "S4Block",
    final_act="glu"),)), Match("performer", ATTENTION, (Peer("performer-pytorch", "performer_pytorch", _performer,
    _call_masked),)), Match("reformer", ATTENTION, (Peer("reformer-pytorch", "reformer_pytorch", _reformer,
    _call_reformer, is_encoder=True),)), Match("linformer", ATTENTION, (Peer("linformer", "linformer", _linformer),)),
    Match("nystromformer", ATTENTION, (Peer("nystrom-attention", "nystrom_attention", _nystrom, _call_masked),)),
    Match("local/overlap", ATTENTION, (Peer("local-attention", "local_attention", _local, _call_masked),), {"size":
    64}), Match("longformer", ATTENTION, (
        Peer("Hugging Face Longformer", "transformers", _huggingface("Longformer", attention_window=512),
             _call_longformer, is_encoder=True),
    )),
    Match("bigbird", ATTENTION, (
        Peer("Hugging Face BigBird", "transformers",
             _huggingface("BigBird", block_size=64, num_random_blocks=3), _call_embedded, is_encoder=True),
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """A model to time. name: "lra" or that of the peer; step: one training step (forward, backward, AdamW)."""

    name: str
    parameters: int
    step: Callable[[], object]


def contestants(match: Match, device: torch.device) -> Iterator[Contestant]:
    """Our encoder, then every peer that is installed."""
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
    names: Iterable[str], device: torch.device, *, budget: float = 10.0,
    on_architecture: Callable[[str], None] = lambda _: None
) -> Iterator[Step]:  # fmt: skip
    """Time training steps of encoders and of their peers, in turns.

    names: architectures, by default all of MATCHES; budget: seconds per measurement; on_architecture: called with each
    name before it is measured. Raises UserError for an architecture without peers.
    """
    matches = {match.architecture: match for match in MATCHES}
    chosen = list(names) or list(matches)
    for name in chosen:
        if name not in matches:
            raise unknown("architecture with peers", name, matches)
    memory.keep_freed()
    for name in chosen:
        on_architecture(name)
        models = {c.name: c for c in contestants(matches[name], device)}
        for by, timing in together({n: c.step for n, c in models.items()}, device, budget=budget).items():
            yield Step(name, by, matches[name].shape, models[by].parameters, timing)


def to_frame(steps: Iterable[Step], device: torch.device) -> pd.DataFrame:
    """A data frame with one row per measurement, with hardware and versions."""
    rows = [
        {
            "architecture": step.architecture, "by": step.by, **asdict(step.shape), "parameters": step.parameters,
            **timing_columns(step.timing), **machine_columns(device),
        }
        for step in steps
    ]  # fmt: skip
    return pd.DataFrame(rows)
