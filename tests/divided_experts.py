"""One process of several that divide experts: `python divided_experts.py RANK PROCESSES FOLDER` writes its results."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed

from lra.architectures._expert_parallel import divided_expert_mlp
from lra.kernels.expert_mlp import expert_mlp

EXPERTS, TOKENS, D_MODEL, HIDDEN = 4, 12, 5, 6


def case(name: str) -> tuple[Tensor, ...]:
    """x, index, gate, w1, w2 in float64. spread: all experts, some choices dropped; crowded: all on the last expert;
    none: no choice at all."""
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(-1, EXPERTS, (TOKENS, 2), generator=draw)
    index = {"spread": index, "crowded": torch.full_like(index, EXPERTS - 1), "none": torch.full_like(index, -1)}[name]
    shapes = (TOKENS, D_MODEL), (TOKENS, 2), (EXPERTS, D_MODEL, HIDDEN), (EXPERTS, HIDDEN, D_MODEL)
    x, gate, w1, w2 = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return x, index, gate, w1, w2


CASES = ("spread", "crowded", "none")


def results(name: str, rank: int = 0, processes: int = 1) -> list[Tensor]:
    """y, and the gradients of x and gate, of this process's tokens; those of w1 and w2 summed over the processes."""
    x, index, gate, w1, w2 = case(name)
    part = slice(rank * TOKENS // processes, (rank + 1) * TOKENS // processes)
    x, gate = x[part].requires_grad_(), gate[part].requires_grad_()
    w1.requires_grad_(), w2.requires_grad_()
    compute = expert_mlp if processes == 1 else divided_expert_mlp
    y = compute(x, index[part], gate, w1, w2, activation="gelu")
    grads = list(torch.autograd.grad(y.square().sum(), (x, gate, w1, w2)))
    if processes > 1:
        for grad in grads[2:]:
            distributed.all_reduce(grad)
    return [y.detach(), *grads]


if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    torch.save({name: results(name, rank, processes) for name in CASES}, folder / f"{rank}.pt")
    distributed.destroy_process_group()
