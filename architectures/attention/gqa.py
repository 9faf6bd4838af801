"""GQA: groups of query heads share one head of keys and values, which shrinks the cache of recurrent mode.

Ainslie et al. 2023, arXiv:2305.13245; with one group it is the multi-query attention of Shazeer 2019, arXiv:1911.02150
(`gqa/mqa`). With d = qkv_dim / H, G = n_kv_heads and g(h) = h // (H / G), so that consecutive heads share:

    Q = x W_q + b_q                                        (B, L, D) -> (B, H, L, d)
    K, V = x W_k + b_k, x W_v + b_v                        (B, L, D) -> (B, G, L, d)
    A_h = softmax(Q_h K_g(h)' / sqrt(d) + bias)            (B, H, L, L), 0 at padded keys
    y = concat_h(A_h V_g(h)) W_o + b_o                     (B, L, D)

Conversion (sections 2.1, 2.2): the keys and values of a group are the mean of those of its heads. `load_multi_head`
reads the weights of a `transformer` that way; the paper then trains on for 5 % of the original steps ("uptraining").
`cache_bytes` is the size of the keys and values kept per sequence, G / H of the Transformer's.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases, as `transformer` has them.

Departures: the paper has relative position buckets (T5) and no biases; here positions are an argument, and the block is
pre-norm with GELU. The encoder is grouped too; the paper groups only the decoder's attention.

Checked against: tensors of Hugging Face's LlamaAttention with grouped and with single keys and values, causal with rope
and bidirectional without, outputs and gradients; torch's scaled_dot_product_attention on mean-pooled projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lra.architectures._attention import AttentionMixer, attend
from lra.architectures._attention_stack import AttentionStack
from lra.attention import cache_bytes, pool_heads, repeat_heads
from lra.encoder import Card


class GQAMixer(AttentionMixer):
    """Softmax attention with n_kv_heads heads of keys and values: (B, L, D) -> (B, L, D)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        # fused kernels want a key head per query head; the copy costs far less than the product
        k, v = (repeat_heads(t, self.n_heads) for t in (k, v))
        return attend(q, k, v, mask, causal=self.causal, slopes=self.slopes, dropout=self.rate)

    def pairs(self, length: int) -> float:
        return float(self.n_heads * length**2)


class GQA(AttentionStack):
    """n_heads: must divide qkv_dim; n_kv_heads: must divide n_heads. qkv_dim: width of all query heads together,
    d_model unless given. positions: "sinusoidal", "learned", "rope", "alibi" or "none". attention_dropout: on the
    attention weights."""

    card = Card(
        title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        year=2023,
        url="https://arxiv.org/abs/2305.13245",
        scaling="L^2",
        causal=False,
        variants={"mqa": {"n_kv_heads": 1}},
    )

    def __init__(self, *, n_heads: int = 4, n_kv_heads: int = 2, **attention: Any) -> None:
        super().__init__(lambda _, **heads: GQAMixer(n_kv_heads=n_kv_heads, **heads), n_heads=n_heads, **attention)
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads is {n_kv_heads}; a divisor of n_heads, {n_heads}")

    def cache_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of keys and values that `step` holds for one sequence after `length` tokens, all layers together."""
        mixers = [layer.mixer for layer in self.blocks if isinstance(layer.mixer, GQAMixer)]
        return sum(
            cache_bytes(
                batch=1, tokens=length, n_layers=1, n_kv_heads=mixer.n_kv_heads, head_dim=mixer.head, dtype=dtype
            )
            for mixer in mixers
        )

    def load_multi_head(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a Transformer of the same widths from its state_dict, each group's keys and values as
        the mean over its heads. Raises ValueError where a name or a shape does not belong to one."""
        own, taken = self.state_dict(), {}
        for name, tensor in state.items():
            if name.endswith(("mixer.qkv.weight", "mixer.qkv.bias")):
                tensor = self._pooled(name, tensor)
            if name not in own or own[name].shape != tensor.shape:
                wanted = tuple(own[name].shape) if name in own else "no such entry"
                raise ValueError(f"state has {name} of shape {tuple(tensor.shape)}; here it is {wanted}")
            taken[name] = tensor
        if missing := sorted(own.keys() - taken.keys()):
            raise ValueError(f"state has no {missing[0]}; it needs {len(own)} entries of a transformer")
        self.load_state_dict(taken)

    def _pooled(self, name: str, tensor: Tensor) -> Tensor:
        """(3 H d, ...) of heads with keys and values of their own -> (H d + 2 G d, ...)."""
        mixer = self.blocks[0].mixer
        assert isinstance(mixer, GQAMixer)
        if len(tensor) != 3 * mixer.widths[0]:
            raise ValueError(f"state has {name} with {len(tensor)} rows; {3 * mixer.widths[0]} of a transformer")
        q, *shared = tensor.chunk(3)
        return torch.cat([q, *(pool_heads(t, mixer.n_heads, mixer.n_kv_heads) for t in shared)])
