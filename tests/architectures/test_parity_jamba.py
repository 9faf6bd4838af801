"""jamba against tensors of Hugging Face's layers, and the order of its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.state_space.jamba import Jamba, JambaAttentionMixer, JambaExperts, JambaMambaMixer


def encoder_of(**own: Any) -> Jamba:
    shape = {"d_model": 6, "n_layers": 2, "length": 16, "state_size": 4, "dt_rank": 3, "n_heads": 2}
    return Jamba(**{**shape, **own}).double()


def test_mamba_equals_the_other_implementation() -> None:
    g = golden("jamba_mamba")
    mixer = encoder_of(attention_every=0).blocks[0].mixer
    assert isinstance(mixer, JambaMambaMixer)
    mixer.load_state_dict({key.removeprefix("param."): t for key, t in g.items() if key.startswith("param.")})
    x = g["x"].requires_grad_()
    u = mixer.in_proj(x).chunk(2, dim=-1)[0]
    taps = F.conv1d(F.pad(u.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=12).mT
    for part, name in zip(mixer.selected(F.silu(taps)), ("dt", "B", "C"), strict=True):
        assert_near(part, g[f"mid.{name}_normed"], name)
    y = mixer(x, everything(x))
    assert_near(y, g["y"], "y")
    assert_near(stepped(mixer, x), g["y"], "step")
    assert_gradients(y, g, x, {name: (p, g[f"grad.{name}"]) for name, p in mixer.named_parameters()})


def test_experts_equal_the_other_implementation() -> None:
    g = golden("jamba_moe")
    experts = JambaExperts(6, 8 / 6, n_experts=4, k=2, balance_weight=1.0).double()
    up, down = "experts.gate_up_proj", "experts.down_proj"
    experts.load_state_dict(
        {"router.weight": g["param.router.weight"], "w1": g[f"param.{up}"].mT, "w2": g[f"param.{down}"].mT}
    )
    x = g["x"].requires_grad_()
    index, gate, balance = experts.route(x, everything(x))
    assert torch.equal(index, g["mid.topk_indices"])
    assert_near(gate, g["mid.topk_weights"], "gates")
    assert_near(balance, g["mid.aux_loss"], "balance")
    (gradient,) = torch.autograd.grad(balance, [experts.router.weight])
    assert_near(gradient, g["mid.aux_grad_router"], "gradient of the balance")
    y = experts(x, everything(x))
    assert_near(y, g["y"], "y")
    assert_gradients(
        y, g, x, {"router": (experts.router.weight, g["grad.router.weight"]), "w1": (experts.w1, g[f"grad.{up}"].mT),
                  "w2": (experts.w2, g[f"grad.{down}"].mT)},
    )  # fmt: skip


def test_padding_chooses_no_expert() -> None:
    torch.manual_seed(0)
    experts = JambaExperts(6, 2.0, n_experts=4, k=2, balance_weight=1.0).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    mask = torch.arange(5)[None] < 3
    y = experts(x, mask)
    assert not y[:, 3:].any()
    alone = experts(x[:, :3], everything(x[:, :3]))
    assert_near(y[:, :3], alone, "y")
    assert_near(experts.route(x, mask)[2], experts.route(x[:, :3], mask[:, :3])[2], "balance")


def test_attention_layer_equals_the_other_implementation() -> None:
    g = golden("jamba_attention_layer")
    layer = encoder_of(
        d_model=8, n_heads=4, n_kv_heads=2, attention_every=1, experts_every=0, block={"expand": 10 / 8}
    ).blocks[0]
    assert isinstance(layer.mixer, JambaAttentionMixer)
    parts = {"mixer.qkv": ("q", "k", "v"), "mixer.out": ("o",)}
    state = {
        f"{own}.weight": torch.cat([g[f"param.self_attn.{p}_proj.weight"] for p in ps]) for own, ps in parts.items()
    }
    state |= {"ffn.up.weight": torch.cat([g[f"param.feed_forward.{p}_proj.weight"] for p in ("gate", "up")])}
    state |= {"ffn.down.weight": g["param.feed_forward.down_proj.weight"]}
    state |= {"norm.weight": g["param.input_layernorm.weight"], "ffn_norm.weight": g["param.pre_ff_layernorm.weight"]}
    assert not layer.load_state_dict(state, strict=False).unexpected_keys
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    x = g["x"].requires_grad_()
    y = layer(x, everything(x))
    assert_near(y, g["y"], "y")
    expected = {key: gradient(g, key) for key in state}
    own = dict(layer.named_parameters())
    assert_gradients(y, g, x, {key: (own[key], t) for key, t in expected.items()})


def gradient(g: dict[str, Tensor], key: str) -> Tensor:
    sources = {
        "mixer.qkv.weight": [f"self_attn.{p}_proj.weight" for p in ("q", "k", "v")],
        "mixer.out.weight": ["self_attn.o_proj.weight"],
        "ffn.up.weight": [f"feed_forward.{p}_proj.weight" for p in ("gate", "up")],
        "ffn.down.weight": ["feed_forward.down_proj.weight"],
        "norm.weight": ["input_layernorm.weight"],
        "ffn_norm.weight": ["pre_ff_layernorm.weight"],
    }[key]
    return torch.cat([g[f"grad.{source}"] for source in sources])


@pytest.mark.parametrize(
    ("n_layers", "own", "attention", "mixtures"),
    [
        (16, {}, [4, 12], [1, 3, 5, 7, 9, 11, 13, 15]),
        (4, {}, [2], [1, 3]),
        (2, {}, [1], [1]),
        (1, {}, [0], []),
        (4, {"attention_every": 0, "experts_every": 4}, [], [3]),
    ],
)
def test_order_of_layers(n_layers: int, own: dict[str, Any], attention: list[int], mixtures: list[int]) -> None:
    layers = encoder_of(n_layers=n_layers, **own).blocks
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mixer, JambaAttentionMixer)] == attention
    assert [i for i, layer in enumerate(layers) if isinstance(layer.ffn, JambaExperts)] == mixtures


test_wrong_arguments_are_named = refuses(Jamba, d_model=8, n_layers=2, length=8)(
    ({"attention_every": -1}, "attention_every is -1"),
    ({"n_heads": 3}, "n_heads is 3"),
    ({"n_kv_heads": 3}, "n_kv_heads is 3"),
    ({"state_size": 0}, "state_size is 0"),
    ({"k": 5}, "n_experts is 4 and k 5"),
    ({"block": {"ffn": "gelu"}}, "block.ffn is 'gelu'"),
)
