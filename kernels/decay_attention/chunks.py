"""A sequence in pieces, and a piece in chunks: what the chunked operators share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 2**20  # elements of one temporary: a piece's temporaries stay in the cache


def chunk_size(chunk: int, length: int) -> int:
    """The power of two at or above `chunk`, no longer than the sequence asks for."""
    return 1 << (min(chunk, length) - 1).bit_length()


def pieces(heads: int, length: int, chunk: int, width: int) -> list[slice]:
    """Slices of the sequence, whole chunks each, of which (heads, steps, width) has about PIECE elements."""
    steps = max(1, PIECE // (heads * chunk * max(chunk, width))) * chunk
    return [slice(start, min(start + steps, length)) for start in range(0, length, steps)]


def cut(x: Tensor, piece: slice, chunk: int, dtype: torch.dtype) -> Tensor:
    """One piece in chunks: (B, L, H, X) -> (B, H, chunks, chunk, X), zeros behind the last step; may be a view of x."""
    x = x[:, piece].to(dtype)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def paste(x: Tensor, piece: slice, target: Tensor) -> None:
    """Write what `cut` would read: (B, H, chunks, chunk, X) into `target`, (B, L, H, X)."""
    target[:, piece] = x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : piece.stop - piece.start]


def per_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, ...) -> (B, H, ...): each of the G groups serves H / G heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def per_group(x: Tensor, groups: int) -> Tensor:
    """(B, H, ...) -> (B, G, ...): sums over the heads of a group."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def carry(update: Tensor, decay: Tensor, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """S <- decay_c S + update_c over the chunks c: the state each of them finds, and the last one.

    update: (B, H, chunks, K, V); decay: (B, H, chunks, K or 1, 1); state: (B, H, K, V).
    """
    found = torch.empty_like(update)
    order = range(update.shape[2])
    for c in reversed(order) if reverse else order:
        found[:, :, c] = state
        state = torch.addcmul(update[:, :, c], decay[:, :, c], state)
    return found, state


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
