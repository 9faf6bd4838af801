"""compressive against tensors of an independent implementation, and the encoder token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from torch import Tensor, nn

from lra.architectures.attention.compressive import Compressive, CompressiveMixer


def mixer_of(width: int, heads: int, **sizes: Any) -> CompressiveMixer:
    biases = nn.Parameter(torch.randn(heads, width // heads)), nn.Parameter(torch.randn(heads, width // heads))
    return CompressiveMixer(width, heads, biases=biases, dropout=0.0, **sizes).double()


def loaded(g: dict[str, Tensor]) -> CompressiveMixer:
    """Without u and v, and with their learned vectors of distances in place of W_r R; their output map has a bias."""
    width, heads, tokens, kept, most, ratio = (int(g[f"cfg.{n}"]) for n in ("D", "H", "L", "mem", "cmem", "ratio"))
    mixer = mixer_of(width, heads, segment=tokens, memory=kept, compressed=most, ratio=ratio, compression="conv")
    nn.init.zeros_(mixer.r_w_bias)
    nn.init.zeros_(mixer.r_r_bias)
    assert mixer.conv is not None
    mixer.conv.load_state_dict({kind: g[f"param.compress_mem_fn.conv.{kind}"] for kind in ("weight", "bias")})
    mixer.qkv_net.load_state_dict({"weight": torch.cat([g["param.to_q.weight"], g["param.to_kv.weight"]])})
    mixer.o_net = nn.Linear(width, width).double()
    mixer.o_net.load_state_dict({kind: g[f"param.to_out.{kind}"] for kind in ("weight", "bias")})
    mixer.r_net.load_state_dict({"weight": torch.eye(width)})
    # the last row of each head is that of the token itself
    mixer.distances = g["in.pos_emb"].flip(1).transpose(0, 1).flatten(1)
    return mixer


def test_segment_equals_an_independent_implementation() -> None:
    g = golden("compressive_memory")
    mixer, x = loaded(g), g["x"].requires_grad_()
    y = mixer.read(x, torch.cat([g["in.cmem"], g["in.mem"]], dim=1))
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"], 1e-11)


def test_memories_and_loss_equal_an_independent_implementation() -> None:
    g = golden("compressive_memory")
    mixer = loaded(g)
    memory, compressed, error = mixer.forget(torch.cat([g["in.mem"], g["x"]], dim=1), g["in.cmem"])
    assert_close(memory, g["mid.new_mem"], 0)
    assert_close(compressed, g["mid.new_cmem"], 1e-12)
    assert error is not None
    assert_close(error.mean(), g["mid.aux_loss"], 1e-12)
    error.mean().backward()
    assert mixer.conv is not None
    assert_close(mixer.conv.weight.grad, g["mid.grad_aux_conv"], 1e-11)
    assert mixer.qkv_net.weight.grad is None


@pytest.mark.parametrize("compression", ["conv", "mean", "max", "most_used"])
def test_mixer_token_by_token(compression: str) -> None:
    """Every token reads a list of states, kept as the paper describes it."""
    torch.manual_seed(0)
    sizes = {"segment": 4, "memory": 6, "compressed": 3, "ratio": 2}
    mixer = mixer_of(8, 2, compression=compression, **sizes).eval()
    nn.init.normal_(mixer.qkv_net.weight)
    nn.init.normal_(mixer.o_net.weight)
    x = torch.randn(1, 22, 8, dtype=torch.float64)
    y = mixer(x, everything(x))
    memory: list[Tensor] = []
    own: list[Tensor] = []
    squeezed: list[Tensor] = []
    usage: dict[int, Tensor] = {}
    for t in range(22):
        if t % 4 == 0:
            memory, own = memory + own, []
            while len(memory) > 6:
                # pairs leave one by one, except where they compete for the places of a whole segment
                leaving = len(memory) - 6
                if compression == "most_used":
                    ranked = sorted(range(leaving), key=lambda i: -usage[id(memory[i])].item())
                    squeezed += [memory[i] for i in sorted(ranked[: leaving // 2])]
                    memory = memory[leaving:]
                else:
                    squeezed.append(pair(mixer, torch.stack(memory[:2])))
                    memory = memory[2:]
            squeezed = squeezed[-3:]
            usage = {}
        own.append(x[0, t])
        keys = torch.stack([*squeezed, *memory, *own])
        q, k, v = (p.unflatten(-1, (2, 4)) for p in (keys @ mixer.qkv_net.weight.T).chunk(3, dim=-1))
        r = (mixer.distances[: len(keys)].flip(0) @ mixer.r_net.weight.T).unflatten(-1, (2, 4))
        heads = []
        for h in range(2):
            scores = k[:, h] @ (q[-1, h] + mixer.r_w_bias[h]) + r[:, h] @ (q[-1, h] + mixer.r_r_bias[h])
            a = (scores / 2).softmax(0)
            heads.append(a @ v[:, h])
            for place, state in enumerate([*memory, *own], len(squeezed)):
                usage[id(state)] = usage.get(id(state), torch.zeros(())) + a[place]
        assert_close(y[0, t], mixer.o_net(torch.cat(heads)), 1e-12)


def pair(mixer: CompressiveMixer, states: Tensor) -> Tensor:
    if mixer.conv is not None:
        return mixer.conv(states.T).squeeze(-1)
    return states.mean(0) if mixer.compression == "mean" else states.amax(0)


def test_loss_is_that_of_real_tokens_and_trains_the_compression_alone() -> None:
    torch.manual_seed(0)
    encoder = Compressive(d_model=8, n_layers=2, length=32, segment=4, ratio=2).double().train()
    x = torch.randn(2, 24, 8, dtype=torch.float64)
    encoder(x[:, :16], everything(x[:, :16]))
    alone = encoder.aux_loss()
    assert alone is not None
    encoder(x, torch.arange(24) < torch.tensor([[16], [16]]))
    # the last whole segment of real tokens is compressed only where another follows
    longer = encoder.aux_loss()
    encoder(x[:, :17], everything(x[:, :17]))
    seventeen = encoder.aux_loss()
    assert longer is not None
    assert seventeen is not None
    assert_close(longer, seventeen, 1e-12)
    assert not torch.isclose(longer, alone)
    longer.backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"layers.{i}.mixer.conv.{kind}" for i in range(2) for kind in ("weight", "bias")}


test_wrong_arguments_are_named = refuses(Compressive, d_model=16, n_layers=1, length=64)(
    ({"compression": "median"}, "compression is 'median'; one of conv, mean, max, most_used"),
    ({"segment": 6}, "segment is 6; a multiple of the 4 tokens that are compressed into one"),
    ({"segment": 8, "memory": 10}, "memory is 10; a multiple of the 4"),
    ({"compressed": 0}, "compressed is 0; at least 1"),
    ({"ratio": 0}, "ratio is 0; at least 1"),
)
