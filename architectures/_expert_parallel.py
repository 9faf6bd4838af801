"""Experts divided among processes: each process computes its share of the experts, for the tokens of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from lra.kernels.expert_mlp import expert_mlp


def share() -> tuple[int, int]:
    """Rank of this process and number of processes; 0 and 1 without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def divided_expert_mlp(x: Tensor, index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, *, activation: str) -> Tensor:
    """`expert_mlp` with all weights on every process, where process p of P computes experts p E / P to (p + 1) E / P.

    Choices are sent to the process of their expert and the outputs back (all-to-all). Every process calls it at the
    same time, in the backward pass too. The gradient of an expert's weights is on its process, and is that of the sum
    of all losses; elsewhere it is 0. Raises ValueError unless P divides E.
    """
    rank, processes = share()
    each, rest = divmod(len(w1), processes)
    if rest:
        raise ValueError(f"{len(w1)} experts are not divisible among {processes} processes")
    token, choice = (index >= 0).nonzero(as_tuple=True)
    expert = index[token, choice]
    order = expert.argsort(stable=True)
    token, choice, expert = token[order], choice[order], expert[order]
    counts = torch.bincount(expert // each, minlength=processes)
    arriving = torch.empty_like(counts)
    distributed.all_to_all_single(arriving, counts)
    leave, arrive = counts.tolist(), arriving.tolist()
    local = expert.new_empty(sum(arrive))
    distributed.all_to_all_single(local, expert % each, arrive, leave)
    rows = _exchange(x[token], leave, arrive)
    # one row more, of no expert: a process that no token visits takes part in the backward pass as well
    rows, local = F.pad(rows, (0, 0, 0, 1)), F.pad(local, (0, 1), value=-1).unsqueeze(1)
    mine = slice(rank * each, (rank + 1) * each)
    y = expert_mlp(rows, local, rows.new_ones(local.shape), w1[mine], w2[mine], activation=activation)
    back = _exchange(y[:-1], arrive, leave)
    return back.new_zeros(x.shape[0], back.shape[1]).index_add(0, token, back * gate[token, choice].unsqueeze(1))


class _Exchange(torch.autograd.Function):
    """Send leave[p] consecutive rows to process p and receive arrive[p]: (sum of leave, D) -> (sum of arrive, D)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leave: list[int], arrive: list[int]) -> Tensor:
        ctx.sizes = leave, arrive
        received = rows.new_empty(sum(arrive), rows.shape[1])
        distributed.all_to_all_single(received, rows.contiguous(), arrive, leave)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        leave, arrive = ctx.sizes
        return _exchange(grad, arrive, leave), None, None


def _exchange(rows: Tensor, leave: list[int], arrive: list[int]) -> Tensor:
    return _Exchange.apply(rows, leave, arrive)
