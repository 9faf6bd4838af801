"""griffin and hawk against tensors of an independent model, the recurrence step by step, attention under the explicit
mask, and the decays they start with."""

from __future__ import annotations

import math
from fnmatch import fnmatch

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor, nn

from lra.architectures._attention import rope
from lra.architectures.recurrent.griffin import RGLRU, GatedMLP, Griffin, LocalMixer, RecurrentMixer
from lra.registry import architectures


def lru_name(own: str) -> str:
    """Their RG-LRU has no modules inside."""
    return own.replace("gate.", "gate_")


def stored(g: dict[str, Tensor], prefix: str, own: str) -> Tensor:
    """What is stored there for a parameter of the recurrent block: its Lambda has the other sign, its two maps from the
    input are apart, its biases of blocks (blocks, width)."""
    if own.startswith("rg_lru."):
        tensor = g[prefix + lru_name(own)]
        return -tensor if own.endswith("param") else tensor if own.endswith("weight") else tensor.flatten()
    if own.startswith("linear_xy."):
        return torch.cat([g[prefix + own.replace("linear_xy", f"linear_{branch}")] for branch in "xy"])
    return g[prefix + own]


def test_rglru_equals_an_independent_one() -> None:
    """Where its positions start again, its state is cut: each document is a sequence of its own here."""
    g = golden("rglru")
    lru, prefix = RGLRU(8, 2).double(), "param."
    lru.load_state_dict({own: g[prefix + lru_name(own)].view_as(p) for own, p in lru.named_parameters()})
    with torch.no_grad():
        lru.recurrent_param.neg_()
    x, cut = g["x"].requires_grad_(), int(g["in.position_ids"][0, 1:].argmin()) + 1
    assert not g["in.position_ids"][0, [0, cut]].any()
    documents = [lru(x[:1, :cut]), lru(x[:1, cut:]), lru(x[1:])]
    y = torch.cat([torch.cat(documents[:2], dim=1), documents[2]])
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[:, -1], g["mid.final_state"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-11)
    for own, parameter in lru.named_parameters():
        assert parameter.grad is not None
        expected = g[f"grad.{prefix}{lru_name(own)}"].view_as(parameter) * (-1 if own == "recurrent_param" else 1)
        assert torch.allclose(parameter.grad, expected, rtol=1e-10, atol=1e-10), own


def block_of(g: dict[str, Tensor], prefix: str) -> RecurrentMixer:
    d_model, width = g[f"{prefix}linear_out.weight"].shape
    taps, blocks = g[f"{prefix}conv_1d.weight"].shape[-1], len(g[f"{prefix}rg_lru.input_gate_weight"])
    block = RecurrentMixer(d_model, width=width, n_blocks=blocks, d_conv=taps, n_layers=1).double()
    block.load_state_dict({own: stored(g, prefix, own) for own, _ in block.named_parameters()})
    return block


def test_recurrent_block_equals_an_independent_one() -> None:
    g = golden("griffin_recurrent_block")
    block, x = block_of(g, "param."), g["x"].requires_grad_()
    inside: list[Tensor] = []
    block.rg_lru.register_forward_hook(lambda *a: inside.extend((a[1][0], a[2])))
    y = block(x, everything(x))
    for found, name in zip((*inside, y), ("mid.conv", "mid.lru", "y"), strict=True):
        torch.testing.assert_close(found, g[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stepped(block, x), g["y"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-11)
    for own, parameter in block.named_parameters():
        assert parameter.grad is not None
        expected = stored(g, "grad.param.", own)
        assert torch.allclose(parameter.grad, expected, rtol=1e-10, atol=1e-10), own


def test_residual_layer_equals_an_independent_one() -> None:
    g = golden("griffin_residual_layer")
    encoder = Griffin(d_model=8, n_layers=1, length=12, rnn_dim=8, n_blocks=2, block={"expand": 1.25}).double()
    mlp, temporal = "param.mlp_block.", "param.temporal_block."
    own = {
        "norm.weight": g["param.temporal_pre_norm.weight"] + 1,
        "ffn_norm.weight": g["param.channel_pre_norm.weight"] + 1,
        "ffn.up.weight": torch.cat([g[f"{mlp}gate_proj.weight"], g[f"{mlp}up_proj.weight"]]),
        "ffn.up.bias": torch.cat([g[f"{mlp}gate_proj.bias"], g[f"{mlp}up_proj.bias"]]),
        "ffn.down.weight": g[f"{mlp}down_proj.weight"],
        "ffn.down.bias": g[f"{mlp}down_proj.bias"],
    }
    block = encoder.blocks[0].mixer
    own |= {f"mixer.{name}": stored(g, temporal, name) for name, _ in block.named_parameters()}
    encoder.blocks[0].load_state_dict(own)
    encoder.norm = nn.Identity()
    x = g["x"].requires_grad_()
    y = encoder(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stepped(encoder, x), g["y"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-11)


def drawn(part: nn.Module, std: float = 0.5) -> nn.Module:
    """In float64, with every parameter drawn, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    for parameter in part.double().parameters():
        nn.init.normal_(parameter, std=std)
    return part


def plain_recurrence(block: nn.Module, x: Tensor) -> Tensor:
    """The equations token by token with dense matrices, a_t as the power that they write."""
    p = dict(block.named_parameters())
    gates = [torch.block_diag(*p[f"rg_lru.{name}_gate.weight"]) for name in ("recurrent", "input")]
    filters, h, outputs = p["conv_1d.weight"].squeeze(1), torch.zeros(()), []
    branch, gate = (x @ p["linear_xy.weight"].T + p["linear_xy.bias"]).chunk(2, dim=-1)
    for t in range(x.shape[1]):
        last = min(filters.shape[1], t + 1)
        u = p["conv_1d.bias"] + sum(filters[:, -1 - j] * branch[:, t - j] for j in range(last))
        r = torch.sigmoid(u @ gates[0] + p["rg_lru.recurrent_gate.bias"])
        i = torch.sigmoid(u @ gates[1] + p["rg_lru.input_gate.bias"])
        a = torch.sigmoid(p["rg_lru.recurrent_param"]) ** (8 * r)
        h = a * h + (1 if t == 0 else (1 - a**2) ** 0.5) * i * u
        z = gate[:, t]
        gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        outputs.append((h * gelu) @ p["linear_out.weight"].T + p["linear_out.bias"])
    return torch.stack(outputs, dim=1)


def plain_attention(block: nn.Module, x: Tensor, heads: int, window: int) -> Tensor:
    """Every head's softmax under the explicit mask."""
    p, size = dict(block.named_parameters()), x.shape[-1] // heads
    views = (x @ p["qkv.weight"].T + p["qkv.bias"]).split(size, dim=-1)
    k, v = rope(views[-2]), views[-1]
    apart = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    bias = torch.zeros(apart.shape, dtype=x.dtype).masked_fill((apart < 0) | (apart > window), -torch.inf)
    rows = [(rope(q) @ k.mT / math.sqrt(size) + bias).softmax(-1) @ v for q in views[:heads]]
    return torch.cat(rows, dim=-1) @ p["out.weight"].T + p["out.bias"]


@pytest.mark.parametrize("kind", ["recurrent", "attention"])
def test_blocks_and_their_gradients_equal_the_plain_equations(kind: str) -> None:
    recurrent = kind == "recurrent"
    block = drawn(
        RecurrentMixer(6, width=12, n_blocks=3, d_conv=3, n_layers=1) if recurrent else LocalMixer(6, 3, 4, 1)
    )
    x, weight = torch.randn(2, 2, 17, 6, dtype=torch.float64)
    x.requires_grad_()
    found = block(x, everything(x))
    expected = plain_recurrence(block, x) if recurrent else plain_attention(block, x, 3, 4)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(stepped(block, x), expected, rtol=1e-11, atol=1e-12)
    names, parameters = zip(*block.named_parameters(), strict=True)
    grads = [torch.autograd.grad((y * weight).sum(), (x, *parameters)) for y in (found, expected)]
    for name, own, other in zip(("x", *names), *grads, strict=True):
        assert torch.allclose(own, other, rtol=1e-10, atol=1e-10), name


def test_step_equals_forward_over_2048_tokens() -> None:
    encoder = Griffin(d_model=8, n_layers=3, length=2048, window=64)
    for parameter in drawn(encoder).float().parameters():
        parameter.requires_grad_(False)
    x = torch.randn(1, 2048, 8)
    torch.testing.assert_close(stepped(encoder, x), encoder(x, everything(x)), rtol=1e-3, atol=1e-3)


def test_a_gate_that_is_shut_keeps_the_state_and_has_finite_gradients() -> None:
    lru = RGLRU(4, 2)
    nn.init.constant_(lru.recurrent_gate.bias, -200.0)
    x = torch.randn(2, 9, 4, requires_grad=True)
    h = lru(x)
    torch.testing.assert_close(h, h[:, :1].expand_as(h))
    h.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *lru.parameters()))


@pytest.mark.parametrize(
    ("name", "n_layers", "kinds"),
    [
        ("griffin", 1, "r"),
        ("griffin", 2, "ra"),
        ("griffin", 3, "rra"),
        ("griffin", 8, "rrarrarr"),
        ("griffin/hawk", 1, "r"),
        ("griffin/hawk", 6, "rrrrrr"),
    ],
)
def test_two_recurrences_and_one_attention(name: str, n_layers: int, kinds: str) -> None:
    encoder = architectures.get(name)(d_model=8, n_layers=n_layers, length=16)
    assert isinstance(encoder, Griffin)
    assert "".join("ra"[isinstance(layer.mixer, LocalMixer)] for layer in encoder.blocks) == kinds
    assert all(isinstance(layer.ffn, GatedMLP) for layer in encoder.blocks)


def test_initialisation() -> None:
    torch.manual_seed(0)
    encoder = Griffin(d_model=120, n_layers=8, length=16, rnn_dim=4000)
    block, attention = encoder.blocks[0].mixer, encoder.blocks[2].mixer
    assert isinstance(block, RecurrentMixer)
    assert isinstance(attention, LocalMixer)
    decay = torch.sigmoid(block.rg_lru.recurrent_param.double()) ** 8
    assert 0.9 * (1 - 1e-6) < decay.min() < 0.901
    assert 0.998 < decay.max() < 0.999 * (1 + 1e-6)
    assert abs(decay.mean().item() - 0.9495) < 0.002
    mlp = encoder.blocks[0].ffn
    assert isinstance(mlp, GatedMLP)
    for weight, variance in (
        (block.linear_xy.weight, 1 / 120),
        (block.conv_1d.weight, 0.01 / 4),
        (block.rg_lru.recurrent_gate.weight, 1 / 1000),
        (block.rg_lru.input_gate.weight, 1 / 1000),
        (block.linear_out.weight, 2 / 8 / 4000),
        (attention.qkv.weight, 1 / 120),
        (attention.out.weight, 2 / 8 / 120),
        (mlp.up.weight, 1 / 120),
        (mlp.down.weight, 2 / 8 / 360),
    ):
        assert weight.var().item() == pytest.approx(variance, rel=0.05)
    assert not any(p.any() for name, p in encoder.named_parameters() if name.endswith("bias"))


def test_widths_follow_the_paper() -> None:
    for d_model, rnn_dim in ((16, 20), (96, 128), (128, 172)):
        encoder = Griffin(d_model=d_model, n_layers=1, length=8)
        block, mlp = encoder.blocks[0].mixer, encoder.blocks[0].ffn
        assert isinstance(block, RecurrentMixer)
        assert isinstance(mlp, GatedMLP)
        assert (block.linear_out.in_features, mlp.down.in_features) == (rnn_dim, 3 * d_model)


def test_state_stops_growing_with_the_window() -> None:
    encoder = Griffin(d_model=8, n_layers=3, length=64, window=5, rnn_dim=12)
    fixed = 2 * 4 * (3 * 12 + 12)  # two recurrences: three inputs of the convolution and h
    assert encoder.state_bytes() == fixed
    assert encoder.state_bytes(5) == encoder.state_bytes(40) == fixed + 4 * 5 * 2 * 2


def test_weight_decay_spares_lambda_biases_and_norms() -> None:
    encoder = Griffin(d_model=8, n_layers=3, length=8)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    rest = {name for name, _ in encoder.named_parameters() if name.endswith("bias") or "norm" in name}
    assert own == {f"layers.{i}.mixer.rg_lru.recurrent_param" for i in range(2)} | rest
    assert all(settings == {"weight_decay": 0.0} for settings in encoder.optim.values())


test_wrong_arguments_are_named = refuses(Griffin, d_model=8, n_layers=2, length=8)(
    ({"rnn_dim": 10}, "rnn_dim is 10; a multiple of n_blocks, 4"),
    ({"rnn_dim": 0}, "rnn_dim is 0; a multiple of n_blocks, 4"),
    ({"n_blocks": 0}, "n_blocks is 0; at least 1"),
    ({"d_conv": 0}, "d_conv is 0; at least 1"),
    ({"window": 0}, "window is 0; at least 1"),
    ({"attention_every": 1}, "attention_every is 1; 0 for none, or at least 2"),
    ({"attention_every": -3}, "attention_every is -3; 0 for none, or at least 2"),
    ({"n_heads": 3}, "n_heads is 3; a divisor"),
    ({"n_heads": 8}, "positions 'rope' turns pairs of features"),
    ({"block": {"ffn": "swiglu"}}, r"block\.ffn is 'swiglu'; 'none'"),
)
