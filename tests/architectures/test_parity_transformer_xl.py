"""transformer_xl against tensors of the authors' layer, and the encoder segment by segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from torch import Tensor, nn

from lra.architectures.attention.transformer_xl import TransformerXL, TransformerXLMixer

NETS = ("qkv_net", "r_net", "o_net")


def loaded(g: dict[str, Tensor]) -> TransformerXLMixer:
    width, heads, size, tokens, kept = (int(g[f"cfg.{n}"]) for n in ("D", "H", "dh", "L", "M"))
    biases = nn.Parameter(g["param.r_w_bias"]), nn.Parameter(g["param.r_r_bias"])
    mixer = TransformerXLMixer(
        width, heads, heads * size, segment=tokens, memory=kept, longest=tokens + kept, biases=biases, dropout=0.0
    ).double()
    for name in NETS:
        mixer.get_submodule(name).load_state_dict({"weight": g[f"param.{name}.weight"]})
    # the table is kept in float32; theirs is exact
    mixer.distances = g["mid.pos_emb"].flip(0)
    return mixer


def test_outputs_and_gradients_equal_the_authors_layer() -> None:
    g = golden("transformer_xl_attention")
    mixer, norm = loaded(g), nn.LayerNorm(int(g["cfg.D"])).double()
    norm.load_state_dict({kind: g[f"param.layer_norm.{kind}"] for kind in ("weight", "bias")})
    x, memory = (g[key].transpose(0, 1).requires_grad_() for key in ("x", "in.mems"))
    read = mixer.read(x, memory)
    assert_close(read.transpose(0, 1), g["mid.attn_out"], 1e-12)
    y = norm(x + read).transpose(0, 1)
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"].transpose(0, 1))
    assert_close(memory.grad, g["grad.mems"].transpose(0, 1))
    for name in NETS:
        assert_close(mixer.get_parameter(f"{name}.weight").grad, g[f"grad.{name}.weight"], name=name)
    for kind in ("weight", "bias"):
        assert_close(norm.get_parameter(kind).grad, g[f"grad.layer_norm.{kind}"], name=f"layer_norm.{kind}")
    assert_close(mixer.r_w_bias.grad, g["grad.r_w_bias"])
    assert_close(mixer.r_r_bias.grad, g["grad.r_r_bias"])
    assert_close(norm(x + mixer.read(x, memory[:, :0])).transpose(0, 1), g["mid.y_no_memory"], 1e-12)
    assert_close((x + mixer.read(norm(x), norm(memory))).transpose(0, 1), g["mid.y_pre_lnorm"], 1e-12)


def test_sinusoids_are_the_authors() -> None:
    g = golden("transformer_xl_attention")
    encoder = TransformerXL(d_model=8, n_layers=1, length=16, segment=6, memory=4, n_heads=2)
    mixer: Any = encoder.blocks[0].mixer
    assert_close(mixer.distances.flip(0).double(), g["mid.pos_emb"], 1e-6)


@pytest.mark.parametrize(("memory", "length"), [(4, 14), (6, 12), (1, 3)])
def test_encoder_is_the_layers_segment_by_segment(memory: int, length: int) -> None:
    """As trained: segment after segment through all layers, their states cached and cut off from gradients."""
    torch.manual_seed(0)
    encoder = TransformerXL(d_model=8, n_layers=2, length=16, segment=4, memory=memory).double()
    x, lengths = torch.randn(2, length, 8, dtype=torch.float64), torch.tensor([length, length - 2])
    mask = torch.arange(length) < lengths[:, None]
    cached = [torch.zeros(2, 0, 8, dtype=torch.float64) for _ in range(2)]
    outputs = []
    for segment in x.masked_fill(~mask[..., None], 0).split(4, dim=1):
        h = segment
        for i, layer in enumerate(encoder.blocks):
            mixer: Any = layer.mixer
            before, cached[i] = cached[i], torch.cat([cached[i], h], 1)[:, -memory:].detach()
            h = layer.norm(h + mixer.read(h, before))
            assert layer.ffn is not None
            assert layer.ffn_norm is not None
            h = layer.ffn_norm(h + layer.ffn(h))
        outputs.append(h)
    expected, y = torch.cat(outputs, 1)[mask], encoder(x, mask)[mask]
    assert_close(y, expected, 1e-12)
    w, parameters = torch.randn_like(y), list(encoder.parameters())
    one, two = (torch.autograd.grad((t * w).sum(), parameters, allow_unused=True) for t in (y, expected))
    for mine, reference in zip(one, two, strict=True):
        assert_close(mine, reference, 1e-10)


def test_reach_is_a_memory_a_layer() -> None:
    """A token sees as far back as N M tokens before its segment, and not a token further."""
    encoder = TransformerXL(d_model=8, n_layers=2, length=32, segment=4, memory=4).double()
    x = torch.randn(1, 32, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 7] += 1
    difference = (encoder(x, everything(x)) - encoder(changed, everything(x))).abs().amax((0, 2)) > 0
    assert difference.nonzero().flatten().tolist() == list(range(7, 16))


def test_state_holds_the_memory_and_the_segment() -> None:
    encoder = TransformerXL(d_model=16, n_layers=3, length=32, segment=4, memory=6)
    assert [encoder.state_bytes(n) // (3 * 16 * 4) for n in (3, 8, 9, 12, 13)] == [3, 8, 7, 10, 7]


def test_scaling_is_that_of_the_segment() -> None:
    assert TransformerXL(d_model=16, n_layers=1, length=64, segment=4).scaling == "L"
    assert TransformerXL(d_model=16, n_layers=1, length=64).scaling == "L^2"


test_wrong_arguments_are_named = refuses(TransformerXL, d_model=16, n_layers=1, length=64)(
    ({"segment": 0}, "segment is 0; at least 1"),
    ({"memory": 0}, "memory is 0; at least 1"),
    ({"n_heads": 3}, "n_heads is 3; a divisor"),
)
