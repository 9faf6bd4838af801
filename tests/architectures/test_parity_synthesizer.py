"""synthesizer against tensors of LRA's layer and its equations with explicit L x L logits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden_tensors import golden
from stepping import stepped
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.attention.synthesizer import Synthesizer, SynthesizerMixer
from lra.attention import merge_heads, split_heads

MIXTURES = ("dense", "random", "factorised", "dense+random", "random+dot", "factorised+dot", "dense+factorised+dot")


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("dense", "dense"),
        ("dense_plus_random", "dense+random"),
        ("factorized", "factorised"),
        ("random", "random"),
        ("random_plus_dot", "random+dot"),
    ],
)
def test_layer_equals_lra_s(name: str, logits: str) -> None:
    """With "dot" padding is left out there too; without, it takes part, so every token is called real. Theirs reshapes
    the dense logits (B, L, H, ...) to (B, H, L, ...) where a transposition is meant; a hook does the same here."""
    g = golden(f"lra_synthesizer_{name}")
    mixer = SynthesizerMixer(
        8, n_heads=2, qkv_dim=8, parts=tuple(logits.split("+")), size=16, k=3, causal=False
    ).double()
    state = {
        "value.weight": g["param.value.kernel"].flatten(1).T,
        "value.bias": g["param.value.bias"].flatten(),
        "out.weight": g["param.out.kernel"].flatten(0, 1).T,
        "out.bias": g["param.out.bias"],
    }
    if "dense" in logits:
        state |= {
            "dense_syn.weight": g["param.dense_syn.kernel"].flatten(1).T,
            "dense_syn.bias": g["param.dense_syn.bias"].flatten(),
            "dense_syn_len.weight": g["param.dense_syn_len.kernel"].T,
            "dense_syn_len.bias": g["param.dense_syn_len.bias"],
        }
    if "random" in logits:
        state["random"] = g["param.random"]
    if "factorised" in logits:
        state |= {name: g[f"param.{name}"] for name in ("random1", "random2")}
    if "dot" in logits:
        parts = ("query", "key")
        state["query_key.weight"] = torch.cat([g[f"param.{part}.kernel"].flatten(1).T for part in parts])
        state["query_key.bias"] = torch.cat([g[f"param.{part}.bias"].flatten() for part in parts])
    mixer.load_state_dict(state)
    mask = g["mask"].bool() if "dot" in logits else torch.ones(2, 12, dtype=torch.bool)
    rows = g["mid.row_valid"]
    x = g["x"].requires_grad_()
    if mixer.dense_syn is not None:
        torch.testing.assert_close(mixer(x, mask)[rows], g["mid.y_transposed"][rows], rtol=0, atol=1e-12)
        mixer.dense_syn.register_forward_hook(lambda _, __, h: merge_heads(h.view(2, 2, 12, 4)))
    y = mixer(x, mask)
    torch.testing.assert_close(y[rows], g["y"][rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((y * g["w"]).sum(), x)[0], g["grad.x"], rtol=0, atol=1e-11)


def explicit(mixer: SynthesizerMixer, x: Tensor, mask: Tensor) -> Tensor:
    length, logits = x.shape[1], torch.zeros((), dtype=x.dtype)
    if mixer.dense_syn is not None:
        assert mixer.dense_syn_len is not None
        logits = logits + mixer.dense_syn_len(split_heads(F.relu(mixer.dense_syn(x)), mixer.n_heads))[..., :length]
    if mixer.random is not None:
        logits = logits + mixer.random[:, :length, :length]
    if mixer.random1 is not None:
        assert mixer.random2 is not None
        logits = logits + mixer.random1[:, :length] @ mixer.random2[..., :length]
    if mixer.query_key is not None:
        q, k = (split_heads(part, mixer.n_heads) for part in mixer.query_key(x).chunk(2, dim=-1))
        logits = logits + q @ k.mT / q.shape[-1] ** 0.5
    allowed = mask[:, None, None, :]
    if mixer.causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return mixer.out(merge_heads(weights @ split_heads(mixer.value(x), mixer.n_heads)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("logits", MIXTURES)
def test_outputs_and_gradients_equal_the_definition(logits: str, causal: bool) -> None:
    mixer = SynthesizerMixer(
        12, n_heads=3, qkv_dim=12, parts=tuple(logits.split("+")), size=20, k=2, causal=causal
    ).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, mask = torch.randn(2, 17, 12, dtype=torch.float64), torch.arange(17) < torch.tensor([[17], [9]])
    w = torch.randn_like(x) * mask.unsqueeze(-1)
    x.requires_grad_()
    own, other = mixer(x, mask), explicit(mixer, x, mask)
    torch.testing.assert_close(own[mask], other[mask], rtol=1e-11, atol=1e-11)
    inputs = (x, *mixer.parameters())
    for a, b in zip(*(torch.autograd.grad((y * w).sum(), inputs) for y in (own, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("logits", MIXTURES)
def test_step_equals_forward(logits: str) -> None:
    mixer = SynthesizerMixer(
        12, n_heads=3, qkv_dim=12, parts=tuple(logits.split("+")), size=20, k=2, causal=True
    ).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    torch.testing.assert_close(stepped(mixer, x), mixer(x, torch.ones(2, 20, dtype=torch.bool)))


def test_logits_start_with_variance_one() -> None:
    for logits in ("random", "factorised"):
        torch.manual_seed(0)
        mixer = SynthesizerMixer(8, n_heads=2, qkv_dim=8, parts=(logits,), size=64, k=32, causal=False)
        found: Tensor | None = mixer.random
        if mixer.random1 is not None and mixer.random2 is not None:
            found = mixer.random1 @ mixer.random2
        assert isinstance(found, Tensor)
        assert 0.9 < found.var() < 1.1


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
        ({"logits": "dense+dence"}, "logits is 'dense+dence'; some of dense, random, factorised, dot"),
        ({"logits": "dense+dense"}, "logits is 'dense+dense'; some of"),
        ({"k": 0}, "k is 0; at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Synthesizer(**shape, **wrong)
    with pytest.raises(ValueError, match="length 9 exceeds the 8 positions this encoder has logits for"):
        Synthesizer(**shape, positions="none")(torch.zeros(1, 9, 16), torch.ones(1, 9, dtype=torch.bool))
