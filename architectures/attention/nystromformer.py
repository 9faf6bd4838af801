"""Nystromformer: softmax attention rebuilt from its columns and rows at a few landmarks, by the Nystrom method.

Xiong et al. 2021, arXiv:2102.03902. With d = qkv_dim / H, m landmarks, sigma the softmax of scores over sqrt(d), and
per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    Q~, K~ = means of Q, K over m segments                 (B, H, m, d)    equation 16
    A = sigma(Q~ K~')                                      (B, H, m, m)
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4       6 times, tends to the inverse of A: equation 14
    y = sigma(Q K~') Z (sigma(Q~ K') V) + conv(V)          (B, H, L, d)    equation 13, and the skip
    out = concat_h(y) W_o + b_o                            (B, L, D)

conv runs along the sequence, one kernel of `kernel` taps per head. The start is Z = A' / (|A|_1 |A|_inf), where |A|_inf
= 1 as rows of a softmax sum to 1.

Segments divide the n real tokens of a sequence, in pieces whose sizes differ by at most one; with n <= m every token is
a landmark and y is softmax attention, as far as Z has converged. Neither segments nor conv see padding.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases; conv as torch.nn.Conv2d.

Departures: norms come before each part, as in the LRA code. The authors' code needs a length that m divides, lets
padding into the means, and takes |A|_1 over the whole batch, so that examples influence each other; here it is the
norm of each matrix, the equation. A segment's mean sees the future: there is no causal form.

Checked against: tensors of Hugging Face's layer with its exact norm, at full length, and of both layers of the
authors, their segments and their norm put in, outputs and gradients; the equations segment by segment on sequences
alone; softmax attention at m = L.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import AttentionMixer, checked_width
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost, lengths_of

POSITIONS = ("sinusoidal", "learned", "none")


def segment_means(x: Tensor, mask: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Means of the real tokens of each segment, and which segments have any: (B, L, D) -> (B, m, D), (B, m) bool."""
    edges = torch.arange(segments + 1, device=x.device) * lengths_of(mask).unsqueeze(1) // segments
    first, last = edges[:, :-1, None], edges[:, 1:, None]
    token = first + torch.arange(-(-x.shape[1] // segments), device=x.device)  # (B, m, longest segment)
    inside = token < last
    picked = x.gather(1, token.clamp(max=x.shape[1] - 1).flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[2]))
    share = inside.to(x.dtype) / (last - first).clamp(min=1)
    means = (share.unsqueeze(2) @ picked.unflatten(1, token.shape[1:])).squeeze(2)
    return means, (last > first).squeeze(-1)


def inverse(A: Tensor, Z: Tensor, iterations: int) -> Tensor:
    """Towards the pseudo-inverse of A: (..., m, m), from the start Z."""
    shape, identity = A.shape, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A, Z = A.flatten(0, -3), Z.flatten(0, -3)
    for _ in range(iterations):
        AZ = A @ Z
        inner = torch.baddbmm(15 * identity, AZ, 7 * identity - AZ, alpha=-1)
        Z = Z @ torch.baddbmm(13 * identity, AZ, inner, alpha=-1) / 4
    return Z.view(shape)


class NystromformerMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, n_heads: int, qkv_dim: int, landmarks: int, kernel: int, iterations: int,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=qkv_dim, positions="none", causal=False, dropout=dropout)
        self.landmarks, self.iterations = landmarks, iterations
        self.conv = nn.Conv2d(n_heads, n_heads, (kernel, 1), padding=(kernel // 2, 0), groups=n_heads, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        m = min(self.landmarks, q.shape[2])
        v = v.masked_fill(~mask[:, None, :, None], 0)
        (mark_q, known), (mark_k, _) = (segment_means(merge_heads(t), mask, m) for t in (q, k))
        mark_q, mark_k = split_heads(mark_q, self.n_heads), split_heads(mark_k, self.n_heads)
        known = known[:, None, None, :]
        with torch.autocast(q.device.type, enabled=False):
            scores = wide(mark_q) @ wide(mark_k).mT * self.head**-0.5
            A = scores.masked_fill(~known, -torch.inf).softmax(-1) * known.mT
            Z = inverse(A, A.mT / A.sum(-2).amax(-1)[..., None, None], self.iterations)
        rows = fused_attention(mark_q, k, v, mask[:, None, None, :], self.rate)
        y = fused_attention(q, mark_k, (Z @ wide(rows)).to(v.dtype), known, self.rate)
        return y + self.conv(v)

    def pairs(self, length: int) -> float:
        m = min(self.landmarks, length)
        return float(self.n_heads * (2 * length * m + m**2))

    def cost(self, length: int) -> Cost:
        width, m = self.out.in_features, min(self.landmarks, length)
        means = 4.0 * m * -(-length // m) * width
        inverting = 8.0 * self.iterations * self.n_heads * m**3
        convolving = 2.0 * length * width * self.conv.kernel_size[0]
        return super().cost(length) + Cost(means + inverting + convolving)


class Nystromformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. landmarks: m. kernel:
    taps of conv, odd. iterations: for Z. attention_dropout: on the softmaxes over landmarks and over tokens, not
    on A."""

    card = Card(
        title="Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
        year=2021,
        url="https://arxiv.org/abs/2102.03902",
        scaling="L",
        causal=False,
        exempt={
            "exports": "the landmarks follow the length",
        },
    )
    refuses_causal = True

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        landmarks: int = 64,
        kernel: int = 35,
        iterations: int = 6,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; one of {', '.join(POSITIONS)}")
        if landmarks < 1 or iterations < 1 or kernel < 1 or kernel % 2 == 0:
            given = f"landmarks {landmarks}, iterations {iterations}, kernel {kernel}"
            raise ValueError(f"{given}: each at least 1, and kernel odd")
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; bidirectional, means of segments see the future")
        super().__init__(
            lambda _: NystromformerMixer(
                d_model, n_heads=n_heads, qkv_dim=width, landmarks=landmarks, kernel=kernel, iterations=iterations,
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, direction=direction, block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
