"""luna against tensors of the authors' modules, and against encoders written out sequence by sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward
from torch import Tensor, nn

from lra.architectures.attention.luna import Luna, LunaMixer

SHAPE: dict[str, Any] = {"d_model": 12, "n_layers": 3, "length": 80, "memory": 5, "n_heads": 2}


def same(own: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(own, other, rtol=0, atol=tolerance)


def theirs(g: dict[str, Tensor], causal: bool) -> LunaMixer:
    """A mixer with the parameters of one of their modules."""
    tied, heads, rows = "param.k_proj.weight" not in g, int(g["cfg.H"]), int(g["cfg.P"])
    width = g["param.out_proj.weight"].shape[0]
    packing = heads if causal else int(g["cfg.PH"])
    mixer = LunaMixer(
        width,
        n_heads=heads,
        pack_heads=packing,
        tied=tied,
        causal=causal,
        memory=nn.Parameter(torch.zeros(rows, width)),
        dropout=0.0,
    ).double()
    maps = {"pk": "pc", "k": "c"} if tied else {n: n for n in ("pk", "pv", "k", "v")}
    maps |= {n: n for n in ("pq", "q", "out")}
    parts = ("weight", "bias")
    state = {f"{own}_proj.{part}": g[f"param.{other}_proj.{part}"] for own, other in maps.items() for part in parts}
    mixer.load_state_dict(state | {"memory": mixer.memory})
    return mixer


@pytest.mark.parametrize("name", ["luna_attention", "luna_attention_untied"])
def test_pack_and_unpack_equal_the_authors(name: str) -> None:
    """With padding, and more heads to pack than to unpack."""
    g = golden(name)
    mixer, mask = theirs(g, causal=False), g["mask"].bool()
    assert not mask.all()
    assert mixer.pack_heads > mixer.n_heads
    x, p, w = (g[key].transpose(0, 1) for key in ("x", "in.p", "w"))
    x.requires_grad_()
    p.requires_grad_()
    packed = mixer.pack(x, mask, p)
    y = mixer.unpack(x, packed)
    same(packed, g["mid.pcontext"].transpose(0, 1))
    same(y, g["y"].transpose(0, 1))
    for found, wanted in zip(torch.autograd.grad((y * w).sum(), (x, p)), ("grad.x", "grad.p"), strict=True):
        same(found, g[wanted].transpose(0, 1), 1e-11)


def test_causal_form_equals_the_authors() -> None:
    """One sequence at a time: theirs have a P each."""
    g = golden("luna_causal")
    mixer = theirs(g, causal=True)
    for b in range(int(g["cfg.B"])):
        x, p, w = (g[key][:, b] for key in ("x", "in.p", "w"))
        mixer.memory.data, x = p, x[None].clone().requires_grad_()
        y = mixer(x, everything(x))
        same(y[0], g["y"][:, b])
        found = torch.autograd.grad((y[0] * w).sum(), (x, mixer.memory))
        same(found[0][0], g["grad.x"][:, b], 1e-11)
        same(found[1], g["grad.p"][:, b], 1e-11)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(i, D), (j, D), (j, D) -> (i, D), head by head."""
    return torch.cat([
        (a @ b.T / math.sqrt(a.shape[1])).softmax(-1) @ c
        for a, b, c in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    ], dim=-1)  # fmt: skip


def written_out(encoder: Luna, x: Tensor) -> Tensor:
    """A bidirectional encoder on one sequence without padding: (L, D) -> (L, D)."""
    assert encoder.positions is not None
    x = x + encoder.positions[: len(x)]
    p: Tensor = encoder.memory
    for i, layer in enumerate(encoder.blocks):
        mixer, before = layer.mixer, layer.prenorm
        assert isinstance(mixer, LunaMixer)
        assert layer.ffn is not None
        assert layer.ffn_norm is not None
        h, m = (layer.norm(x), encoder.memory_norms[i](p)) if before else (x, p)
        packed = attention(mixer.pq_proj(m), mixer.pk_proj(h), (mixer.pv_proj or mixer.pk_proj)(h), mixer.pack_heads)
        x = x + mixer.out_proj(
            attention(mixer.q_proj(h), mixer.k_proj(packed), (mixer.v_proj or mixer.k_proj)(packed), mixer.n_heads)
        )
        p = p + packed
        if before:
            x = x + layer.ffn(layer.ffn_norm(x))
        else:
            x, p = layer.norm(x), encoder.memory_norms[i](p)
            x = layer.ffn_norm(x + layer.ffn(x))
    return encoder.norm(x)


def token_by_token(mixer: LunaMixer, x: Tensor) -> Tensor:
    """The causal equations on one sequence: (L, D) -> (L, D)."""
    heads = []
    maps = (
        mixer.pq_proj(mixer.memory),
        mixer.pk_proj(x),
        mixer.q_proj(x),
        mixer.k_proj(x),
        (mixer.v_proj or mixer.k_proj)(x),
    )
    for pq, pk, q, k, v in zip(*(t.chunk(mixer.n_heads, dim=-1) for t in maps), strict=True):
        scale = math.sqrt(q.shape[1])
        pack = torch.log2(1 + 2 ** (pk @ pq.T / scale))
        rows = []
        for t in range(len(x)):
            scores = sum((q[t] @ k[j] / scale) * pack[j] for j in range(t + 1)) / (t + 1)
            rows.append(sum((torch.as_tensor(scores).softmax(0) @ pack[j]) * v[j] for j in range(t + 1)) / (t + 1))
        heads.append(torch.stack(rows))
    return mixer.out_proj(torch.cat(heads, dim=-1))


def random(module: nn.Module) -> list[nn.Parameter]:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return list(module.parameters())


def agree(one: Tensor, two: Tensor, inputs: list[Any]) -> None:
    """Outputs and every gradient."""
    same(one, two, 1e-11)
    w = torch.randn_like(one)
    for found, wanted in zip(*(torch.autograd.grad((y * w).sum(), inputs) for y in (one, two)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prenorm", [True, False])
def test_encoder_equals_the_equations_sequence_by_sequence(prenorm: bool, tied: bool) -> None:
    """P carries what a layer packed into the next, each sequence its own, without its padding."""
    encoder = Luna(**SHAPE, pack_heads=3, tied=tied, block={"prenorm": prenorm}).double()
    assert encoder.positions is not None
    parameters, lengths = random(encoder), (9, 6)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    other = torch.cat([written_out(encoder, x[b, :n]) for b, n in enumerate(lengths)])
    agree(encoder(x, mask)[mask], other, [x, *parameters])


@pytest.mark.parametrize("tied", [True, False])
def test_causal_form_equals_the_equations_token_by_token(tied: bool) -> None:
    """Longer than a chunk of the operator."""
    mixer = Luna(**SHAPE, tied=tied, direction="causal").double().blocks[0].mixer
    assert isinstance(mixer, LunaMixer)
    parameters = random(mixer)
    x = torch.randn(1, 70, 12, dtype=torch.float64, requires_grad=True)
    agree(mixer(x, everything(x))[0], token_by_token(mixer, x[0]), [x, *parameters])


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(Luna(**SHAPE, direction="causal").blocks[0].mixer, 12, rtol=1e-4, atol=1e-5)


def test_one_row_of_memory_gives_every_token_the_same() -> None:
    """An unpack over a single row has nothing to choose."""
    mixer = Luna(**{**SHAPE, "memory": 1}).double().blocks[0].mixer
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    y = mixer(x, everything(x))
    same(y, y[:, :1].expand_as(y))


def test_attention_dropout_only_when_training() -> None:
    x = torch.randn(1, 9, 12)
    for direction in ("bidirectional", "causal"):
        encoder = Luna(**SHAPE, direction=direction, attention_dropout=0.5)
        plain = Luna(**SHAPE, direction=direction)
        plain.load_state_dict(encoder.state_dict())
        assert torch.equal(encoder.eval()(x, everything(x)), plain(x, everything(x)))
        assert not torch.equal(encoder.train()(x, everything(x)), plain(x, everything(x)))


def test_initialisation() -> None:
    """Xavier's bound times the gain; P standard normal, one for all layers."""
    torch.manual_seed(0)
    for direction in ("bidirectional", "causal"):
        encoder = Luna(d_model=100, n_layers=2, length=8, memory=64, tied=False, direction=direction)
        assert encoder.memory.std().item() == pytest.approx(1, rel=0.05)
        for layer in encoder.blocks:
            mixer = layer.mixer
            assert isinstance(mixer, LunaMixer)
            assert mixer.memory is encoder.memory
            assert (mixer.pv_proj is None) == (direction == "causal")
            for linear in (
                mixer.pq_proj,
                mixer.pk_proj,
                mixer.pv_proj,
                mixer.q_proj,
                mixer.k_proj,
                mixer.v_proj,
                mixer.out_proj,
            ):
                if linear is not None:
                    gain = 1 if linear is mixer.out_proj else 2**-0.5
                    assert 0.99 < linear.weight.abs().max() / (gain * (6 / 200) ** 0.5) <= 1
                    assert not linear.bias.any()
    assert {n for n, _ in Luna(**SHAPE).named_parameters() if "memory" in n} == {
        "memory", *(f"memory_norms.{i}.{part}" for i in range(2) for part in ("weight", "bias"))
    }  # fmt: skip


test_wrong_arguments_are_named = refuses(Luna, d_model=16, n_layers=1, length=8)(
    ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
    ({"pack_heads": 3}, "pack_heads is 3; a divisor of the attention's width 16"),
    ({"pack_heads": 2, "direction": "causal"}, "pack_heads is 2; the causal form has n_heads, 4"),
    ({"memory": 0}, "memory is 0; at least 1"),
    ({"positions": "rope"}, "positions is 'rope'; one of sinusoidal, learned, none"),
    ({"direction": "both"}, "direction is 'both'; one of causal, bidirectional"),
)


def test_a_sequence_longer_than_the_positions_is_named() -> None:
    with pytest.raises(ValueError, match="length 9 exceeds the 8 positions"):
        Luna(d_model=16, n_layers=1, length=8)(torch.zeros(1, 9, 16), torch.ones(1, 9, dtype=torch.bool))
