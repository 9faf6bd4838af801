"""transformer and _attention against torch.nn.TransformerEncoderLayer and tensors from well-known implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_tensors import assert_close, assert_gradients, everything, golden
from refusals import refuses
from torch import Tensor, nn

from lra.architectures._attention import alibi_bias, alibi_slopes, attend, rope
from lra.architectures._relative import ShawMixer, T5Mixer, buckets
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import sinusoidal
from lra.architectures.attention.transformer import Transformer
from lra.attention import attention_mask
from lra.registry import architectures


def real_prefixes(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def copy_attention(mixer: SoftmaxMixer, theirs: nn.MultiheadAttention) -> None:
    mixer.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    mixer.out.load_state_dict(theirs.out_proj.state_dict())


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_layer_equals_torch_encoder_layer(prenorm: bool, activation: str) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation=activation, batch_first=True, norm_first=prenorm, dtype=torch.float64
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = Transformer(
        d_model=16, n_layers=1, length=11, positions="none", block={"prenorm": prenorm, "ffn": activation}
    ).double()
    layer: Any = ours.layers[0]
    copy_attention(layer.mixer, theirs.self_attn)
    for own, other in (
        (layer.norm, theirs.norm1), (layer.ffn_norm, theirs.norm2),
        (layer.ffn.up, theirs.linear1), (layer.ffn.down, theirs.linear2),
    ):  # fmt: skip
        own.load_state_dict(other.state_dict())
    mask = real_prefixes(11, 7, 1)
    x = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    y, expected = layer(x, mask)[mask], theirs(z, src_key_padding_mask=~mask)[mask]
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    w = torch.randn_like(y)
    (y * w).sum().backward()
    (expected * w).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    own_grads = layer.mixer.qkv.weight.grad, layer.ffn.up.bias.grad
    their_grads = theirs.self_attn.in_proj_weight.grad, theirs.linear1.bias.grad
    torch.testing.assert_close(own_grads, their_grads, rtol=1e-10, atol=1e-10)


def llama_mixer(g: dict[str, Tensor], positions: str, causal: bool) -> SoftmaxMixer:
    heads = int(g["cfg.H"])
    mixer = SoftmaxMixer(
        int(g["cfg.D"]), heads, width=heads * int(g["cfg.d"]), positions=positions, causal=causal
    ).double()
    qkv = [[g[f"param.{p}_proj.{kind}"] for p in "qkv"] for kind in ("weight", "bias")]
    mixer.qkv.load_state_dict({"weight": torch.cat(qkv[0]), "bias": torch.cat(qkv[1])})
    mixer.out.load_state_dict({"weight": g["param.o_proj.weight"], "bias": g["param.o_proj.bias"]})
    return mixer


def test_causal_rope_equals_llama_attention() -> None:
    g = golden("mha_llama")
    mixer, x = llama_mixer(g, "rope", causal=True), g["x"].requires_grad_()
    y = mixer(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-11)


def test_bidirectional_without_positions_equals_llama_attention() -> None:
    g = golden("mha_llama")
    y = llama_mixer(g, "none", causal=False)(g["x"], torch.ones(g["x"].shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g["mid.y_norope_bidirectional"], rtol=1e-12, atol=1e-12)


def test_rope_pairs_halves_as_llama() -> None:
    g = golden("rope_half")
    q = g["in.q"].requires_grad_()
    for row, positions in enumerate(g["in.position_ids"].tolist()):
        for t, position in enumerate(positions):
            for name, expected in (("q", g["y"]), ("k", g["mid.k_rot"])):
                turned = rope(g[f"in.{name}"][row, :, t : t + 1], position)
                torch.testing.assert_close(turned[:, 0], expected[row, :, t], rtol=1e-12, atol=1e-12)
    turned = torch.cat([rope(q[0, :, t : t + 1], int(p)) for t, p in enumerate(g["in.position_ids"][0])], dim=1)
    (turned * g["w"][0]).sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(q.grad[0], g["grad.q"][0], rtol=1e-12, atol=1e-12)


def test_rope_interleaved_as_gptj() -> None:
    g, turned = golden("rope_interleaved"), int(golden("rope_interleaved")["cfg.rd"])
    for t, position in enumerate(g["in.position_ids"].tolist()):
        for name, expected in (("q", g["y"]), ("k", g["mid.k_rot"])):
            got = rope(g[f"in.{name}"][:, t, :, None, :turned], position, interleaved=True)[..., 0, :]
            torch.testing.assert_close(got, expected[:, t, :, :turned], rtol=1e-12, atol=1e-12)
    q = g["in.q"].requires_grad_()
    parts = [
        torch.cat([rope(q[:, t, :, None, :turned], int(p), interleaved=True)[..., 0, :], q[:, t, :, turned:]], dim=-1)
        for t, p in enumerate(g["in.position_ids"])
    ]
    y = torch.stack(parts, dim=1)
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, q, g["w"])[0], g["grad.q"], rtol=1e-12, atol=1e-12)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).unbind()
    near, far = ((rope(q, s + 3) @ rope(k, s).T) for s in (0, 16_000))
    torch.testing.assert_close(near, far, rtol=1e-10, atol=1e-10)


def test_alibi_slopes_and_causal_attention_as_bloom() -> None:
    g = golden("alibi")
    for heads in range(1, 17):
        expected = g["mid.slopes_1_to_16"][heads - 1, :heads].double()
        torch.testing.assert_close(alibi_slopes(heads), expected, rtol=1e-6, atol=0)
    # their rows are left-padded; turned to right padding, a causal bias depends on distances alone
    for row, pad in enumerate(g["cfg.left_pad"].tolist()):
        q, k, v = (g[f"in.{n}"][row : row + 1, :, pad:].requires_grad_() for n in "qkv")
        mask = torch.ones(1, q.shape[2], dtype=torch.bool)
        y = attend(q, k, v, mask, causal=True, slopes=alibi_slopes(int(g["cfg.H"])))
        torch.testing.assert_close(y[0], g["y"][row, :, pad:], rtol=1e-12, atol=1e-12)
        (y[0] * g["w"][row, :, pad:]).sum().backward()
        for own, name in ((q, "q"), (k, "k"), (v, "v")):
            assert own.grad is not None
            torch.testing.assert_close(own.grad[0], g[f"grad.{name}"][row, :, pad:], rtol=1e-11, atol=1e-11)


def test_bidirectional_alibi_equals_dense_definition() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 4, dtype=torch.float64).unbind()
    mask = real_prefixes(9, 5)
    slopes = alibi_slopes(3)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    scores = q @ k.transpose(-1, -2) / 2 - slopes[:, None, None] * distance
    expected = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, mask, slopes=slopes), expected, rtol=1e-12, atol=1e-12)
    assert (alibi_bias(slopes, 9, True)[:, 0, 1:] == -torch.inf).all()


def t5_mixer(g: dict[str, Tensor], causal: bool) -> T5Mixer:
    heads, table = int(g["cfg.H"]), nn.Parameter(g["param.relative_attention_bias.weight"])
    width, farthest = heads * int(g["cfg.dh"]), int(g["cfg.max_distance"])
    mixer = T5Mixer(int(g["cfg.D"]), heads, width=width, causal=causal, table=table, farthest=farthest).double()
    weight = torch.cat([g[f"param.{p}.weight"] for p in "qkv"])
    mixer.qkv.load_state_dict({"weight": weight, "bias": weight.new_zeros(len(weight))})
    mixer.out.load_state_dict({"weight": g["param.o.weight"], "bias": weight.new_zeros(len(g["param.o.weight"]))})
    return mixer


def test_t5_equals_its_attention() -> None:
    g = golden("t5_relative_bias")
    x, mask = g["x"].requires_grad_(), everything(g["x"])
    mixer = t5_mixer(g, causal=False)
    y = mixer(x, mask)
    assert_close(y, g["y"], 1e-12)
    assert_close(mixer.bias(x.shape[1], x.shape[1]), g["mid.position_bias"][0], 0)
    weight = torch.cat([g[f"grad.{p}.weight"] for p in "qkv"])
    table = (mixer.relative_attention_bias, g["grad.relative_attention_bias.weight"])
    of_weights = {"qkv": (mixer.qkv.weight, weight), "out": (mixer.out.weight, g["grad.o.weight"]), "table": table}
    assert_gradients(y, g, x, of_weights, 1e-11)
    assert_close(t5_mixer(g, causal=True)(x, mask), g["mid.y_causal"], 1e-12)
    ahead = torch.arange(-200, 201)
    assert torch.equal(buckets(-ahead, False), g["mid.bucket_table_32_128"])
    assert torch.equal(buckets(-ahead, True), g["mid.bucket_table_32_128_causal"])


def test_t5_shares_one_table_and_starts_soft() -> None:
    torch.manual_seed(0)
    encoder = Transformer(d_model=64, n_layers=2, length=256, positions="t5")
    first, second = (layer.mixer for layer in encoder.blocks)
    assert isinstance(first, T5Mixer)
    assert first.relative_attention_bias is second.relative_attention_bias
    q, k, _ = first.heads(torch.randn(1, 256, 64))
    assert 0.8 < (q @ k.mT).std() < 1.2


def shaw_mixer(g: dict[str, Tensor], causal: bool) -> ShawMixer:
    heads, size, left = (int(g[f"cfg.{n}"]) for n in ("H", "dh", "left"))
    mixer = ShawMixer(8, heads, width=heads * size, causal=causal, farthest=left)
    mixer.right = 0 if causal else int(g["cfg.right"])
    for name in ("rel_k_embed", "rel_v_embed"):
        setattr(mixer, name, nn.Parameter(g[f"param.{name}.weight"][: left + 1 + mixer.right]))
    return mixer


def test_shaw_equals_an_independent_implementation() -> None:
    g = golden("shaw_relative")
    q, k, v = (g[f"in.{n}"].transpose(1, 2).requires_grad_() for n in "qkv")
    mask = everything(g["in.q"])
    mixer = shaw_mixer(g, causal=False)
    y = mixer.attend(q, k, v, mask)
    assert_close(y.transpose(1, 2), g["y"], 1e-12)
    (y.transpose(1, 2) * g["w"]).sum().backward()
    for own, name in ((q, "q"), (k, "k"), (v, "v")):
        assert_close(own.grad, g[f"grad.{name}"].transpose(1, 2), 1e-11, name)
    assert_close(mixer.rel_k_embed.grad, g["grad.rel_k_embed.weight"])
    assert_close(mixer.rel_v_embed.grad, g["grad.rel_v_embed.weight"])
    assert_close(shaw_mixer(g, causal=True).attend(q, k, v, mask).transpose(1, 2), g["mid.y_causal"], 1e-12)


def test_sinusoids_as_in_the_paper() -> None:
    g = golden("sinusoidal_positions")
    torch.testing.assert_close(sinusoidal(int(g["cfg.L"]), int(g["cfg.D"])).double(), g["y"], rtol=0, atol=1e-7)
    late = 16_383
    expected = np.sin(late / 10000 ** (np.arange(0, 64, 2) / 64))
    np.testing.assert_allclose(sinusoidal(late + 1, 64)[late, ::2].numpy(), expected, rtol=0, atol=1e-6)


def test_masks_combine() -> None:
    mask = real_prefixes(7, 4)
    i, j = torch.arange(7)[:, None], torch.arange(7)
    rules = {"causal": j <= i, "window": (i - j).abs() <= 2, "block": i // 3 == j // 3}
    torch.testing.assert_close(attention_mask(mask), mask[:, None, None])
    for chosen in ({"causal": True}, {"window": 2}, {"block": 3}, {"causal": True, "window": 2, "block": 3}):
        expected = mask[:, None, None, :].expand(2, 1, 7, 7)
        for kind in chosen:
            expected = expected & rules[kind]
        got = attention_mask(mask, **chosen)
        assert torch.equal(got, expected | (i == j))


def test_attention_starts_soft() -> None:
    """The documented property of the initialisation: Q K' / sqrt(d) of normalised inputs has about unit variance."""
    torch.manual_seed(0)
    for d_model in (64, 256):
        mixer = SoftmaxMixer(d_model, 4, width=d_model, positions="none", causal=False)
        q, k, _ = mixer.heads(torch.randn(1, 512, d_model))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        assert 0.8 < scores.std() < 1.2
        assert not mixer.qkv.bias.any()


def test_variants_are_what_their_names_say() -> None:
    make = {name: architectures.get(name) for name in architectures.names(variants=True) if "transformer/" in name}
    built = {name.partition("/")[2]: c(d_model=16, n_layers=1, length=8) for name, c in make.items()}
    assert isinstance(built["learned"].positions, nn.Parameter)
    assert built["rope"].layers[0].mixer.rotary
    assert built["alibi"].layers[0].mixer.slopes is not None
    assert isinstance(built["t5"].layers[0].mixer, T5Mixer)
    assert isinstance(built["shaw"].layers[0].mixer, ShawMixer)
    assert all(built[name].positions is None for name in ("rope", "alibi", "t5", "shaw", "nope", "llama"))
    assert not built["original"].layers[0].prenorm
    assert built["original"].layers[0].ffn.kind == "relu"
    assert isinstance(built["llama"].layers[0].norm, nn.RMSNorm)


test_wrong_arguments_are_named = refuses(Transformer, d_model=16, n_layers=1, length=8)(
    ({"n_heads": 3}, "n_heads is 3"),
    ({"positions": "rotary"}, "rope"),
    ({"positions": "rope", "n_heads": 16}, "odd number"),
    ({"max_distance": 9}, "max_distance is 9, but positions is 'sinusoidal'; t5 or shaw"),
    ({"positions": "shaw", "max_distance": 0}, "max_distance is 0; at least 1"),
    ({"positions": "t5", "buckets": 2}, "buckets is 2; at least 4"),
    ({"positions": "t5", "max_distance": 8}, "max_distance is 8; at least 17"),
    ({"direction": "concat"}, "direction is 'concat'"),
)
