"""mla against tensors of Hugging Face's layer, in full and through the absorbed maps, and the size of its cache."""

from __future__ import annotations

from typing import Any

from golden_tensors import assert_close, assert_layer_as_stored, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor

from lra.architectures.attention.mla import MLA, MLAMixer
from lra.registry import architectures


def loaded(g: dict[str, Tensor], causal: bool) -> MLAMixer:
    width, heads, kv, q, turned, head, value = (
        int(g[f"cfg.{n}"]) for n in ("D", "H", "kv_rank", "q_rank", "rope", "nope", "v")
    )
    mixer = MLAMixer(
        width, heads, kv_rank=kv, q_rank=q, rope_dim=turned, head=head, value=value, causal=causal
    ).double()
    mixer.load_state_dict({name: g[f"param.{name}"] for name, _ in mixer.named_parameters()})
    return mixer


def test_outputs_and_gradients_equal_hugging_face() -> None:
    g = golden("mla")
    mixer = loaded(g, causal=True)
    assert_layer_as_stored(mixer, g, {name: g[f"grad.{name}"] for name, _ in mixer.named_parameters()})
    assert_close(loaded(g, causal=False)(g["x"], everything(g["x"])), g["mid.y_bidirectional"], 1e-12)


def test_steps_and_cache_equal_hugging_face() -> None:
    g = golden("mla")
    y, (latents, turned) = run(loaded(g, causal=True), g["x"])
    assert_close(y, g["y"], 1e-12)
    assert_close(latents, g["mid.latent_kv"], 1e-12)
    # stored with the first of each pair before the second
    assert_close(turned.unflatten(-1, (-1, 2)).mT.flatten(-2), g["mid.k_rope"], 1e-12)


def test_the_state_is_the_latent_and_one_turned_key() -> None:
    size: dict[str, Any] = {"d_model": 64, "n_layers": 3, "length": 8, "direction": "causal"}
    assert MLA(**size, kv_rank=16, rope_dim=8).state_bytes(5) == 3 * 5 * (16 + 8) * 4
    assert MLA(**size).state_bytes(5) == 3 * 5 * (32 + 8) * 4
    assert architectures.get("transformer")(**size).state_bytes(5) == 3 * 5 * 2 * 64 * 4


test_wrong_arguments_are_named = refuses(MLA, d_model=16, n_layers=1, length=8)(
    ({"n_heads": 3}, "n_heads is 3; a divisor"),
    ({"kv_rank": 0}, "kv_rank is 0 and q_rank 8; at least 1 and at least 0"),
    ({"rope_dim": 3}, "rope_dim is 3; an even number"),
)
