"""Inputs of `band_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from lra.kernels._case import Case

Make = Callable[[Generator, torch.dtype, torch.device], dict[str, Any]]


def _inputs(
    batch: int,
    length: int,
    heads: int,
    size: int,
    window: int | tuple[int, int],
    *,
    lengths: tuple[int, ...] = (),
    marked: bool = False,
    random: int = 0,
    logits: float = 1.0,
    **options: Any,
) -> Make:
    """lengths: real tokens per row (all when empty); marked: a few further global tokens, not as many in each row;
    random: blocks drawn per row of blocks, repetitions and -1 among them; logits: size of the scores."""

    def make(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        wide = torch.promote_types(dtype, torch.float32)

        def normal() -> Tensor:
            return torch.randn(batch, length, heads, size, generator=generator, dtype=wide, device=device).to(dtype)

        given: dict[str, Any] = {"q": normal() * logits, "k": normal(), "v": normal(), "mask": None, "window": window}
        position = torch.arange(length, device=device)
        if lengths:
            given["mask"] = position < torch.tensor(lengths, device=device).unsqueeze(1)
        if marked:
            row = torch.arange(batch, device=device).unsqueeze(1)
            given["global_mask"] = (position % (3 + row) == 1) & (position < 8)
        if random:
            blocks = -(-length // options["block"])
            shape = (heads, blocks, random)
            given["random_blocks"] = torch.randint(-1, blocks, shape, generator=generator, device=device)
        return given | options

    return make


def _strided(generator: Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """q as every second channel, k as the transpose of (B, H, L, E)."""
    given = _inputs(2, 20, 3, 8, 4)(generator, dtype, device)
    halves = {name: given[name][..., ::2] for name in ("q", "k", "v")}
    return given | halves | {"k": halves["k"].transpose(1, 2).contiguous().transpose(1, 2)}


CASES = [
    Case("window", "small", _inputs(2, 7, 2, 2, 2, lengths=(7, 4))),
    Case("dilation and globals", "small", _inputs(2, 7, 2, 2, 1, dilation=[1, 2], n_global=1, marked=True)),
    Case("blocks", "small", _inputs(1, 9, 2, 2, 1, block=2, random=2, n_global=2)),
    # of size 1: the gradients of q and k are 0 here, and only one product each is exactly that in every order
    Case("length 1", "edge", _inputs(2, 1, 3, 1, 5)),
    Case("length 63", "edge", _inputs(2, 63, 2, 4, (3, 0), lengths=(63, 40), causal=True)),
    Case("length 64", "edge", _inputs(1, 64, 3, 5, (1, 2), dilation=[3, 3, 2], lengths=(50,))),
    Case("length 65", "edge", _inputs(2, 65, 2, 4, 1, block=8, n_global=8, random=2, lengths=(65, 30))),
    Case("length 1000", "edge", _inputs(1, 1000, 2, 8, 40, lengths=(900,)), interpreted=False),
    Case("window beyond the sequence", "edge", _inputs(2, 30, 2, 4, 100, dilation=2)),
    Case("causal globals", "edge", _inputs(2, 30, 2, 4, 3, n_global=1, marked=True, causal=True, lengths=(30, 9))),
    Case("one-way globals", "edge", _inputs(2, 30, 2, 4, 3, n_global=1, marked=True, mutual=False)),
    Case("causal blocks", "edge", _inputs(2, 30, 2, 4, (1, 0), block=4, random=2, causal=True)),
    Case("dilated blocks", "edge", _inputs(1, 50, 2, 4, 1, block=4, random=1, dilation=[2, 1])),
    Case("only its own block", "edge", _inputs(2, 33, 2, 4, 0, block=8, lengths=(33, 20))),
    Case("rows that see nothing", "edge", _inputs(2, 40, 2, 4, 2, lengths=(3, 1))),
    Case("large scores", "edge", _inputs(1, 40, 2, 4, 5, logits=100.0)),
    Case("strided", "edge", _strided),
    Case("E27", "gpu", _inputs(1, 130, 2, 27, 20)),
    Case("E128", "gpu", _inputs(1, 130, 1, 128, 20)),
    Case("E256", "gpu", _inputs(1, 130, 1, 256, 20)),
    Case("B2 L4096 H8 E64 window 128", "bench", _inputs(2, 4096, 8, 64, 128)),
    Case("B1 L16384 H4 E64 window 512", "bench", _inputs(1, 16384, 4, 64, 512)),
]
