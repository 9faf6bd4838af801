"""gqa against Hugging Face's LlamaAttention and the paper's conversion by mean pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from refusals import refuses
from torch import Tensor

from lra.architectures.attention.gqa import GQA, GQAMixer
from lra.architectures.attention.transformer import Transformer

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 12}


def mixer_of(g: dict[str, Tensor], positions: str, causal: bool) -> GQAMixer:
    heads, shared, size = (int(g[f"cfg.{n}"]) for n in "HKd")
    mixer = GQAMixer(
        int(g["cfg.D"]), heads, width=heads * size, positions=positions, causal=causal, n_kv_heads=shared
    ).double()
    qkv = [torch.cat([g[f"param.{p}_proj.{kind}"] for p in "qkv"]) for kind in ("weight", "bias")]
    mixer.qkv.load_state_dict({"weight": qkv[0], "bias": qkv[1]})
    mixer.out.load_state_dict({"weight": g["param.o_proj.weight"], "bias": g["param.o_proj.bias"]})
    return mixer


@pytest.mark.parametrize("name", ["gqa_llama", "mqa_llama"])
def test_equals_llama_attention(name: str) -> None:
    g = golden(name)
    x, mask = g["x"].requires_grad_(), torch.ones(g["x"].shape[:2], dtype=torch.bool)
    mixer = mixer_of(g, "rope", causal=True)
    y = mixer(x, mask)
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-11)
    y = mixer_of(g, "none", causal=False)(g["x"], mask)
    torch.testing.assert_close(y, g["mid.y_norope_bidirectional"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gqa_llama", "mqa_llama"])
def test_step_equals_llama_attention(name: str) -> None:
    g = golden(name)
    mixer, x = mixer_of(g, "rope", causal=True), g["x"]
    state = mixer.init_state(len(x))
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, g["y"][:, t], rtol=1e-12, atol=1e-12)


def test_conversion_is_the_mean_of_each_group() -> None:
    g = golden("gqa_meanpool")
    heads, shared, size, width = (int(g[f"cfg.{n}"]) for n in "HKdD")
    theirs = Transformer(d_model=width, n_layers=1, length=8, n_heads=heads, qkv_dim=heads * size).double()
    ours = GQA(d_model=width, n_layers=1, length=8, n_heads=heads, n_kv_heads=shared, qkv_dim=heads * size).double()
    state = theirs.state_dict()
    rows = heads * size
    name = "layers.0.mixer.qkv.weight"
    state[name] = torch.cat([state[name][:rows], g["in.Wk"], g["in.Wv"]])
    ours.load_multi_head(state)
    weight = ours.state_dict()[name]
    pooled = torch.cat([g["mid.Wk_pooled"], g["mid.Wv_pooled"]])
    torch.testing.assert_close(weight, torch.cat([state[name][:rows], pooled]), rtol=0, atol=1e-15)
    # pooled keys and values attended to with shared heads
    k, v = (g[f"in.{n}"].unflatten(1, (shared, -1)).mean(2) for n in "kv")
    mixer: Any = ours.layers[0].mixer
    y = mixer.attend(g["in.q"], k, v, torch.ones(g["in.q"].shape[0], g["in.q"].shape[2], dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=1e-13, atol=1e-13)


def test_as_many_groups_as_heads_is_the_transformer() -> None:
    torch.manual_seed(0)
    theirs, ours = Transformer(**SMALL).double(), GQA(**SMALL, n_kv_heads=4).double()
    ours.load_multi_head(theirs.state_dict())
    x, mask = torch.randn(2, 12, 16, dtype=torch.float64), torch.arange(12) < torch.tensor([[12], [7]])
    torch.testing.assert_close(ours(x, mask)[mask], theirs(x, mask)[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rope", "alibi", "none"])
def test_step_equals_forward(positions: str) -> None:
    torch.manual_seed(0)
    encoder = GQA(**SMALL, positions=positions, direction="causal").double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    expected, state = encoder(x, torch.ones(2, 12, dtype=torch.bool)), encoder.init_state(2)
    for t in range(12):
        y, state = encoder.step(x[:, t], state)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-11, atol=1e-11)


def test_cache_is_what_is_reported() -> None:
    for shared in (1, 2, 4):
        encoder = GQA(**SMALL, n_kv_heads=shared, direction="causal")
        state = encoder.init_state(1)
        for _ in range(5):
            _, state = encoder.step(torch.randn(1, 16), state)
        held = sum(t.nbytes for own in state[1] for t in own[:2])
        assert held == encoder.cache_bytes(5) == 2 * 2 * shared * 4 * 5 * 4
    assert encoder.cache_bytes(5, torch.bfloat16) == held // 2


def test_starts_soft_with_every_number_of_groups() -> None:
    torch.manual_seed(0)
    for shared in (1, 4):
        mixer = GQAMixer(128, 4, width=128, positions="none", causal=False, n_kv_heads=shared)
        q, k, _ = mixer.heads(torch.randn(1, 256, 128))
        scores = q @ k.repeat_interleave(4 // shared, 1).mT / q.shape[-1] ** 0.5
        # fewer rows, a wider Xavier interval: at most 2 / (1 + 1 / 4) more variance
        assert 0.8 < scores.std() < 1.4
        assert not mixer.qkv.bias.any()


test_wrong_arguments_are_named = refuses(GQA, **SMALL)(
    ({"n_kv_heads": 3}, "n_kv_heads is 3; a divisor of n_heads, 4"),
    ({"n_kv_heads": 0}, "n_kv_heads is 0"),
    ({"n_heads": 3}, "n_heads is 3"),
    ({"positions": "rotary"}, "rope"),
)


def test_other_weights_are_refused() -> None:
    ours = GQA(**SMALL)
    with pytest.raises(ValueError, match="32 rows; 48 of a transformer"):
        ours.load_multi_head({"layers.0.mixer.qkv.weight": torch.zeros(32, 16)})
    with pytest.raises(ValueError, match="no such entry"):
        ours.load_multi_head({"embedding": torch.zeros(1)})
    with pytest.raises(ValueError, match="state has no"):
        ours.load_multi_head({})
