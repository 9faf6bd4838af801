"""mega against tensors of the authors' modules, its recurrent mode, and the properties of its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor, nn

from lra.architectures.attention import mega
from lra.architectures.attention.mega import Mega, MegaMixer, MovingAverages
from lra.kernels.fft_conv import fft_conv

EMA = ("alpha", "delta", "beta", "gamma", "omega")
LINEAR = ("v_proj", "mx_proj", "h_proj")


def attention_state(g: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our names for the parameters of a MovingAverageGatedAttention, without its norm."""
    state = {f"move.{p}": g[f"{prefix}move.{p}"].squeeze(-1) for p in EMA}
    for name in LINEAR:
        state |= {f"{name}.{part}": g[f"{prefix}{name}.{part}"] for part in ("weight", "bias")}
    state |= {part: g[prefix + part] for part in ("gamma", "beta")}
    if f"{prefix}rel_pos_bias.alpha" in g:
        return state | {"angles": torch.cat([g[f"{prefix}rel_pos_bias.{p}"] for p in ("alpha", "beta")])}
    return state | {"rel_pos_bias": g[f"{prefix}rel_pos_bias.rel_pos_bias"]}


def same(own: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["mega_ema_causal", "mega_ema_bidirectional"])
def test_moving_averages_equal_the_authors(name: str) -> None:
    g = golden(name)
    module = MovingAverages(6, 3, causal=name == "mega_ema_causal").double()
    module.load_state_dict({p: g[f"param.{p}"].squeeze(-1) for p in EMA})
    same(module.kernel(16), g["mid.kernel"])
    x = g["x"].transpose(0, 1).contiguous().requires_grad_()
    y = module(x)
    same(y.transpose(0, 1), g["y"])
    found = torch.autograd.grad((y * g["w"].transpose(0, 1)).sum(), (x, *(getattr(module, p) for p in EMA)))
    same(found[0].transpose(0, 1), g["grad.x"])
    for p, grad in zip(EMA, found[1:], strict=True):
        same(grad, g[f"grad.param.{p}"].squeeze(-1))


@pytest.mark.parametrize("name", ["mega_attention_causal_softmax", "mega_attention_causal_laplace_rotary"])
def test_gated_attention_equals_the_authors(name: str) -> None:
    g = golden(name)
    attention, bias = ("laplace", "rotary") if "rotary" in name else ("softmax", "simple")
    mixer = MegaMixer(
        8,
        positions=16,
        norm=nn.LayerNorm(8),
        z_dim=4,
        value_dim=10,
        averages=3,
        attention=attention,
        bias=bias,
        chunk=None,
        causal=True,
    ).double()
    norms = {f"norm.{p}": g[f"param.norm.norm.{p}"] for p in ("weight", "bias")}
    mixer.load_state_dict(attention_state(g, "param.") | norms)
    x = g["x"].transpose(0, 1).contiguous().requires_grad_()
    y = x + mixer(x, everything(x))
    same(y.transpose(0, 1), g["y"])
    (grad,) = torch.autograd.grad((y * g["w"].transpose(0, 1)).sum(), x)
    same(grad.transpose(0, 1), g["grad.x"])


@pytest.mark.parametrize(
    "name",
    [
        "mega_layer_softmax_layernorm_post",
        "mega_layer_laplace_layernorm_chunk_pad",
        "mega_layer_laplace_batchnorm_pre",
        "mega_layer_softmax_scalenorm_chunk_pad",
    ],
)
def test_layer_equals_the_authors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the layer: an encoder of one, whose last norm is taken off. Theirs goes on computing at the padding, where
    the stored gradient has weights too: for that of the first sequence, of which one token is padding, so does ours.
    (In the second, a whole chunk of theirs attends to nothing.)"""
    g = golden(name)
    norm = next(kind for kind in ("layer", "batch", "scale") if f"{kind}norm" in name)
    attention, post, chunk = name.split("_")[2], "post" in name or norm == "scale", int(g["cfg.chunk_size"])
    encoder = Mega(
        d_model=8, n_layers=1, length=16, direction="bidirectional", z_dim=4, value_dim=10, averages=3,
        attention=attention, chunk=chunk if chunk > 0 else None,
        block={"expand": 1.5, "prenorm": not post, "norm": norm},
    ).double()  # fmt: skip
    [layer] = encoder.blocks
    state = {f"mixer.{own}": value for own, value in attention_state(g, "param.mega_layer.").items()}
    for key, value in g.items():
        place, _, part = key.removeprefix("param.").partition(".norm.norm.")
        if part:
            into = "ffn_norm" if place == "nffn" else "norm" if post else "mixer.norm"
            state[f"{into}.{'weight' if part == 'scalar' else part}"] = value
    for part in ("weight", "bias"):
        state |= {
            f"ffn.{own}.{part}": g[f"param.nffn.{other}.{part}"] for own, other in (("up", "fc1"), ("down", "fc2"))
        }
    layer.load_state_dict(state)
    x = g["x"].transpose(0, 1).contiguous().requires_grad_()
    mask = g["in.padding_mask"] == 0 if "in.padding_mask" in g else everything(x)
    real = mask.unsqueeze(-1)
    if "mid.y_eval" in g:  # before the statistics move
        same(layer.eval()(x, mask).transpose(0, 1), g["mid.y_eval"])
    y = layer.train()(x, mask)
    same(y * real, g["y"].transpose(0, 1) * real)
    if mask.all():
        (grad,) = torch.autograd.grad((y * g["w"].transpose(0, 1)).sum(), x)
        same(grad.transpose(0, 1), g["grad.x"])
        return
    assert (~mask).sum(1).tolist() == [1, 8]
    x, mask, real = x[:1].detach().requires_grad_(), mask[:1], real[:1]
    mixer = layer.mixer
    assert isinstance(mixer, MegaMixer)
    padded, forward = mixer.norm(x).masked_fill(real, 0), mixer.forward

    def with_padding(h: Tensor, kernel: Tensor, omega: Tensor, **options: Any) -> Tensor:
        return fft_conv(h, kernel, omega, **options) + mixer.move.omega * padded

    monkeypatch.setattr(mega, "fft_conv", with_padding)
    monkeypatch.setattr(mixer, "forward", lambda h, _: forward(h, mask))
    y = layer(x, everything(x))
    same(y[0], g["y"][:, 0])
    same(torch.autograd.grad(y, x, g["w"][:, :1].transpose(0, 1))[0][0], g["grad.x"][:, 0])


@pytest.mark.parametrize("own", [{}, {"attention": "laplace", "bias": "rotary", "chunk": 16}])
def test_step_equals_forward(own: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = Mega(d_model=8, n_layers=1, length=256, z_dim=8, averages=4, **own).blocks[0].mixer
    x = torch.randn(1, 256, 8)
    with torch.no_grad():
        torch.testing.assert_close(stepped(mixer, x), mixer(x, everything(x)), rtol=1e-4, atol=1e-5)


def test_averages_run_over_all_chunks_and_attention_does_not() -> None:
    torch.manual_seed(0)
    mixer = Mega(d_model=8, n_layers=1, length=32, chunk=8).blocks[0].mixer
    assert isinstance(mixer, MegaMixer)
    x = torch.randn(1, 32, 8)
    other = x.clone()
    other[:, 7] = torch.randn(8)

    def moved() -> Tensor:
        return (mixer(x, everything(x)) - mixer(other, everything(x))).abs().amax(dim=(0, 2))

    assert moved()[8] > 1e-5
    with torch.no_grad():
        mixer.move.gamma.zero_()
    assert moved()[7] > 1e-5
    assert not moved()[8:].any()


def test_initialisation() -> None:
    torch.manual_seed(0)
    averages = MovingAverages(400, 4, causal=True)
    torch.testing.assert_close(averages.beta.mean(0), torch.tensor([1.0, -1.0, 1.0, -1.0]), rtol=0, atol=0.01)
    for parameter, deviation in ((averages.alpha, 0.2), (averages.delta, 0.2), (averages.gamma, 1.0)):
        assert parameter.std().item() == pytest.approx(deviation, rel=0.1)
    [layer] = Mega(d_model=64, n_layers=1, length=16).blocks
    for name in ("ffn.up", "mixer.mx_proj"):
        assert not layer.get_parameter(f"{name}.bias").any()
        assert layer.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.1)


test_wrong_arguments_are_named = refuses(Mega, d_model=8, n_layers=1, length=8)(
    ({"attention": "relu2"}, "softmax, laplace"),
    ({"bias": "alibi"}, "simple, rotary"),
    ({"chunk": 0}, "chunk is 0"),
    ({"bias": "rotary", "z_dim": 3}, "z_dim is 3"),
)
