"""linformer against tensors of the linformer package and of LRA's layer, and softmax attention in the limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import load_lra
from golden_tensors import everything, golden
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures.attention.linformer import Linformer, LinformerMixer
from lra.attention import merge_heads, split_heads


def agrees(mixer: LinformerMixer, g: dict[str, Tensor]) -> None:
    x = g["x"].requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((y * g["w"]).sum(), x)[0], g["grad.x"], rtol=0, atol=1e-11)


def test_equals_the_linformer_package() -> None:
    g = golden("linformer_attn")
    mixer = LinformerMixer(
        12, n_heads=3, qkv_dim=12, proj_k=nn.Parameter(g["param.proj_k"]), proj_v=nn.Parameter(g["param.proj_v"])
    ).double()
    mixer.qkv.weight.data = torch.cat([g[f"param.to_{name}.weight"] for name in "qkv"])
    mixer.out.weight.data, mixer.out.bias.data = g["param.to_out.weight"], g["param.to_out.bias"]
    agrees(mixer, g)


def test_equals_the_package_where_all_is_shared() -> None:
    """Theirs has one head of keys, which are its values too: our maps hold its rows for each head, twice."""
    g = golden("linformer_attn_shared")
    of_all = nn.Parameter(g["param.proj_k"])
    mixer = LinformerMixer(12, n_heads=3, qkv_dim=12, proj_k=of_all, proj_v=of_all).double()
    mixer.qkv.weight.data = torch.cat([g["param.to_q.weight"], g["param.to_k.weight"].repeat(6, 1)])
    mixer.out.weight.data, mixer.out.bias.data = g["param.to_out.weight"], g["param.to_out.bias"]
    agrees(mixer, g)


def test_equals_lra_s() -> None:
    g = golden("lra_linformer")
    shared = nn.Parameter(g["param.lr_kernel"])
    mixer = LinformerMixer(8, n_heads=2, qkv_dim=8, proj_k=shared, proj_v=shared)
    load_lra(mixer, g)
    agrees(mixer, g)


@pytest.mark.parametrize("own", [False, True])
def test_softmax_attention_where_projections_are_identities(own: bool) -> None:
    identity = torch.eye(12, dtype=torch.float64)
    identity = identity.expand(3, -1, -1) if own else identity
    mixer = LinformerMixer(
        12, n_heads=3, qkv_dim=12, proj_k=nn.Parameter(identity), proj_v=nn.Parameter(identity)
    ).double()
    x = torch.randn(2, 12, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = (split_heads(part, 3) for part in mixer.qkv(x).chunk(3, dim=-1))
    exact = mixer.out(merge_heads((q @ k.mT / 2).softmax(-1) @ v))
    own_y, w = mixer(x, everything(x)), torch.randn_like(x)
    torch.testing.assert_close(own_y, exact, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((y * w).sum(), x)[0] for y in (own_y, exact)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sharing", ["head", "key-value", "layer", "none"])
def test_sharing_and_padding(sharing: str) -> None:
    """Padded rows equal the equations on the real tokens alone, with as many length maps as the mode says."""
    encoder = Linformer(d_model=8, n_layers=2, length=9, n_heads=2, k=3, sharing=sharing).double()
    maps = [p for name, p in encoder.named_parameters() if ".proj_" in name]
    assert len(maps) == {"head": 4, "key-value": 2, "layer": 1, "none": 4}[sharing]
    assert {tuple(p.shape) for p in maps} == ({(2, 9, 3)} if sharing == "none" else {(9, 3)})
    mixer = encoder.blocks[0].mixer
    assert isinstance(mixer, LinformerMixer)
    nn.init.normal_(mixer.qkv.bias)
    lengths = (7, 4)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    x = torch.randn(2, 7, 8, dtype=torch.float64) * mask.unsqueeze(-1)
    found = mixer(x, mask)
    for b, n in enumerate(lengths):
        q, k, v = (split_heads(part, 2) for part in mixer.qkv(x[b : b + 1, :n]).chunk(3, dim=-1))
        k, v = mixer.proj_k[..., :n, :].mT @ k, mixer.proj_v[..., :n, :].mT @ v
        torch.testing.assert_close(found[b : b + 1, :n], mixer.out(merge_heads(F.softmax(q @ k.mT / 2, -1) @ v)))


def test_initialisation() -> None:
    """The bound of Xavier's uniform times 2^-1/2."""
    weight = Linformer(d_model=8, n_layers=1, length=100, k=50, n_heads=2, sharing="none").blocks[0].mixer.proj_k
    assert isinstance(weight, Tensor)
    for part in weight:
        assert 0.97 < part.abs().max() / (6 / 150 / 2) ** 0.5 <= 1


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
        ({"sharing": "heads"}, "sharing is 'heads'; one of head, key-value, layer, none"),
        ({"k": 0}, "k is 0; at least 1"),
        ({"direction": "causal"}, "direction is 'causal'; bidirectional"),
    ):
        with pytest.raises(ValueError, match=said):
            Linformer(**shape, **wrong)
    with pytest.raises(ValueError, match="length 9 exceeds the 8 positions of E and F"):
        Linformer(**shape, positions="none")(torch.zeros(1, 9, 16), torch.ones(1, 9, dtype=torch.bool))
