"""mixture_of_depths against tensors of an independent implementation around torch's encoder layer."""

from __future__ import annotations

from typing import Any

import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Block, Layer
from lra.architectures.attention.mixture_of_depths import MixtureOfDepths, Router

NAMES = {
    "mixer.qkv": ("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
    "mixer.out": ("self_attn.out_proj.weight", "self_attn.out_proj.bias"),
    "ffn.up": ("linear1.weight", "linear1.bias"), "ffn.down": ("linear2.weight", "linear2.bias"),
    "norm": ("norm1.weight", "norm1.bias"), "ffn_norm": ("norm2.weight", "norm2.bias"),
}  # fmt: skip
PARAMETERS = {
    f"{own}.{kind}": theirs
    for own, both in NAMES.items()
    for kind, theirs in zip(("weight", "bias"), both, strict=True)
}
SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 4, "length": 16}


def loaded(g: dict[str, Tensor], causal: bool) -> tuple[Layer, Router]:
    width, heads, hidden = (int(g[f"cfg.{n}"]) for n in ("D", "H", "ff"))
    mixer = SoftmaxMixer(width, heads, width=width, positions="none", causal=causal)
    layer = Layer(mixer, width, Block(expand=hidden / width), 0.0).double()
    layer.load_state_dict({own: g[f"param.block.{theirs}"] for own, theirs in PARAMETERS.items()})
    router = Router(width, float(g["cfg.capacity"]), causal).double()
    router.weight.load_state_dict({"weight": g["param.mod_router.weight"]})
    if router.predictor is not None:
        router.predictor.load_state_dict({kind: g[f"param.aux_mlp.{kind}"] for kind in ("weight", "bias")})
    return layer, router


def test_outputs_and_gradients_equal_an_independent_implementation() -> None:
    g = golden("mixture_of_depths")
    (layer, router), x = loaded(g, causal=False), g["x"].requires_grad_()
    r = router.weight(x).squeeze(-1)
    assert_close(r, g["mid.router_logits"], 1e-12)
    assert torch.equal(router.choose(r, everything(x)), g["mid.selected"])
    y = router(layer, x, everything(x))
    assert_close(y, g["y"], 1e-11)
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"], 1e-10)
    for own, theirs in PARAMETERS.items():
        assert_close(layer.get_parameter(own).grad, g[f"grad.block.{theirs}"], 1e-10, own)
    assert_close(router.weight.weight.grad, g["grad.mod_router.weight"], 1e-10)


def test_causal_form_and_predictor_equal_an_independent_implementation() -> None:
    g = golden("mixture_of_depths")
    layer, router = loaded(g, causal=True)
    x = g["x"].requires_grad_()
    assert_close(router(layer, x, everything(x)), g["mid.y_causal"], 1e-11)
    assert router.loss is not None
    assert router.predictor is not None
    assert_close(router.loss, g["mid.aux_loss"], 1e-12)
    router.loss.backward()
    assert x.grad is None
    assert_close(router.predictor.weight.grad, g["mid.aux_grad_weight"], 1e-12)
    assert_close(router.predictor.bias.grad, g["mid.aux_grad_bias"], 1e-12)


def test_prediction_routes_as_the_choice_it_learned() -> None:
    """A predictor that knows the choice gives the trained form, whole and token by token."""
    g = golden("mixture_of_depths")
    layer, router = loaded(g, causal=True)
    assert router.predictor is not None
    # one sequence, whose choice a threshold on the router's weight makes
    x, r = g["x"][:1], g["mid.router_logits"][0]
    router.predictor.weight.data, chosen = router.weight.weight.data, g["mid.selected"][0]
    router.predictor.bias.data.fill_(-(r[chosen].min() + r[~chosen].max()) / 2)
    y = router.eval()(layer.eval(), x, everything(x))
    assert_close(y, g["mid.y_causal"][:1], 1e-11)


def test_choice_is_of_real_tokens() -> None:
    torch.manual_seed(0)
    router, r = Router(16, 0.3, False), torch.randn(4, 20)
    lengths = torch.tensor([20, 11, 3, 1])
    mask = torch.arange(20) < lengths[:, None]
    chosen = router.choose(r, mask)
    assert chosen.sum(1).tolist() == [6, 3, 1, 1]
    assert not (chosen & ~mask).any()
    for row, n in enumerate(lengths.tolist()):
        rest = r[row, :n][~chosen[row, :n]]
        assert not len(rest) or r[row, chosen[row]].min() > rest.max()


def test_every_second_block_is_routed_and_the_work_shrinks() -> None:
    encoder = MixtureOfDepths(**SMALL)
    assert list(encoder.routers) == ["1", "3"]
    assert list(MixtureOfDepths(**SMALL, every=1).routers) == ["0", "1", "2", "3"]
    assert list(MixtureOfDepths(**SMALL, every=9).routers) == ["3"]
    costs = [MixtureOfDepths(**SMALL, capacity=c).cost(1024).matmul for c in (0.125, 0.5, 1.0)]
    assert costs[0] < costs[1] < costs[2]


def test_diagnostics_count_what_took_part() -> None:
    torch.manual_seed(0)
    encoder = MixtureOfDepths(**SMALL, direction="causal", capacity=0.25).train()
    encoder(torch.randn(3, 16, 16), torch.arange(16) < torch.tensor([[16], [8], [4]]))
    found = encoder.diagnostics()
    assert found["routed1"] == found["routed3"] == (4 + 2 + 1) / 28
    assert 0 <= found["predicted1"] <= 1
    assert encoder.diagnostics() == {}


def test_steps_equal_the_forward_of_evaluation() -> None:
    torch.manual_seed(0)
    encoder = MixtureOfDepths(**SMALL, direction="causal").double().eval()
    for name in encoder.routers:
        torch.nn.init.normal_(encoder.get_parameter(f"routers.{name}.weight.weight"))
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    assert_close(stepped(encoder, x), encoder(x, everything(x)), 1e-11)


test_wrong_arguments_are_named = refuses(MixtureOfDepths, **SMALL)(
    ({"capacity": 0.0}, r"capacity is 0\.0; a share of the tokens"),
    ({"capacity": 1.5}, r"capacity is 1\.5"),
    ({"every": 0}, "every is 0; at least 1"),
    ({"positions": "rope"}, "positions is 'rope'; one of sinusoidal, learned, none"),
    ({"block": {"prenorm": False}}, "block.prenorm is false"),
)
