"""perceiver against tensors of Hugging Face's cross-attention and an independent decoder, and from its equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._stack import Block
from lra.architectures.attention.perceiver import Cross, Perceiver

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 12, "n_latents": 5}
PARTS = {"q": "query", "k": "key", "v": "value"}


def cross(g: dict[str, Tensor], d_input: str, block: Block, state: dict[str, Tensor]) -> Cross:
    query, inputs, qk, value, heads = (int(g[f"cfg.{n}"]) for n in ("Dq", d_input, "qk", "v", "H"))
    part = Cross(
        query, d_input=inputs, qk_dim=qk, v_dim=value, n_heads=heads, block=block, dropout=0.0, attention_dropout=0.0
    ).double()
    part.load_state_dict(state)
    return part


def test_reading_equals_hugging_face() -> None:
    g = golden("perceiver_cross")
    names = {f"{own}_proj": f"self.{name}" for own, name in PARTS.items()} | {"o_proj": "output.dense"}
    names |= {"q_norm": "self.layernorm1", "kv_norm": "self.layernorm2"}
    state = {f"{own}.{kind}": g[f"param.{name}.{kind}"] for own, name in names.items() for kind in ("weight", "bias")}
    part = cross(g, "Dk", Block(ffn="none"), state)
    latents, inputs = g["in.latents"].requires_grad_(), g["in.inputs"].requires_grad_()
    y = part(latents, inputs, everything(latents), g["mask"].bool())
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(latents.grad, g["grad.latents"])
    assert_close(inputs.grad, g["grad.inputs"])


def test_output_queries_equal_an_independent_decoder() -> None:
    g = golden("perceiver_io_decoder")
    names = {f"{n}_proj": f"0.module.attention.{n}_proj" for n in "qkvo"}
    names |= {"q_norm": "0.module.q_norm", "kv_norm": "0.module.kv_norm"}
    names |= {"ffn_norm": "1.module.0", "ffn.up": "1.module.1", "ffn.down": "1.module.3"}
    pairs = {f"{own}.{kind}": f"cross_attn.{n}.{kind}" for own, n in names.items() for kind in ("weight", "bias")}
    state = {own: g[f"param.{name}"] for own, name in pairs.items()}
    part = cross(g, "Dl", Block(expand=float(g["cfg.widening"])), state)
    latents, query = g["in.x_latent"].requires_grad_(), g["param.output_query_provider._query"].requires_grad_()
    queries = query.expand(len(latents), -1, -1)
    masks = everything(queries), everything(latents)
    head = [g[f"param.output_adapter.linear.{kind}"].requires_grad_() for kind in ("weight", "bias")]
    h = part(queries, latents, *masks)
    assert_close(h, g["mid.after_mlp"], 1e-12)
    y = F.linear(h, *head)
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(latents.grad, g["grad.x_latent"])
    assert_close(query.grad, g["grad.output_query_provider._query"])
    for own, name in pairs.items():
        assert_close(part.get_parameter(own).grad, g[f"grad.{name}"], name=own)
    for kind, tensor in zip(("weight", "bias"), head, strict=True):
        assert_close(tensor.grad, g[f"grad.output_adapter.linear.{kind}"], name=f"head {kind}")
    alone = F.linear(part(queries, latents, *masks, residual=False), *head)
    assert_close(alone, g["mid.y_no_query_residual"], 1e-12)


@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"repeats": 1}, {"output": "mean"}])
def test_encoder_follows_its_equations(options: dict[str, Any]) -> None:
    """Sequence by sequence, without padding; the parts are compared above and in `transformer`."""
    torch.manual_seed(0)
    encoder = Perceiver(**SMALL, **options).double()
    torch.nn.init.normal_(encoder.latents)
    x, mask = torch.randn(2, 12, 16, dtype=torch.float64), torch.arange(12) < torch.tensor([[12], [7]])
    y = encoder(x, mask)
    assert isinstance(encoder.positions, Tensor)
    for row, length in enumerate((12, 7)):
        tokens = (x[row, :length] + encoder.positions[:length])[None]
        z = encoder.latents[None]
        for repeat in range(options.get("repeats", 2)):
            part = encoder.first if repeat == 0 else encoder.again
            assert part is not None
            z = part(z, tokens, everything(z), everything(tokens))
            for layer in encoder.blocks:
                z = layer(z, everything(z))
        if encoder.decoder is None:
            expected = z.mean(1).expand(length, -1)
        else:
            expected = encoder.decoder(tokens, z, everything(tokens), everything(z))[0]
        assert_close(y[row, :length], encoder.norm(expected), 1e-12)


def test_repeats_share_their_weights() -> None:
    count = [sum(p.numel() for p in Perceiver(**SMALL, repeats=n).parameters()) for n in (1, 2, 5)]
    assert count[0] < count[1] == count[2]


test_wrong_arguments_are_named = refuses(Perceiver, **SMALL)(
    ({"n_latents": 0}, "n_latents is 0; at least 1"),
    ({"repeats": 0}, "repeats is 0; at least 1"),
    ({"output": "latents"}, "output is 'latents'; one of queries, mean"),
    ({"direction": "causal"}, "direction is 'causal'; bidirectional, latents read all tokens"),
    ({"n_heads": 3}, "n_heads is 3; a divisor"),
)
