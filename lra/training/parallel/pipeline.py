"""Pipeline parallelism by torch.distributed.pipelining: the blocks of an encoder divided among processes.

The batch is divided into microbatches, which pass through the stages one after the other (schedule 1F1B, Narayanan et
al. 2021, arXiv:2104.04473). Each process stores only the activations of its stage, for at most as many microbatches as
there are stages. All weights are on every process; each process computes the gradients of its stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

from lra.encoder import Encoder, clean_padding
from lra.errors import UserError
from lra.model import Batch, Classifier
from lra.target import Target
from lra.task import UNSCORED

USE = "--strategy pipeline needs an encoder that is a sequence of blocks"


def check(model: Classifier, processes: int) -> None:
    """Raise UserError unless a model can be divided into stages, with independent microbatches."""
    encoder, name = model.encoder, type(model.encoder).__name__
    if model.towers > 1:
        raise UserError("--strategy pipeline is for tasks with one sequence per example; use ddp or fsdp")
    if not all(hasattr(encoder, part) for part in ("enter", "blocks", "norm")):
        raise UserError(f"{USE}, but {name} is not; use ddp or fsdp")
    if len(_blocks(encoder)) < processes:
        raise UserError(f"--strategy pipeline: {processes} processes need as many blocks, but {name} has "
                        f"{len(_blocks(encoder))}; set model.n_layers, or use ddp or fsdp")  # fmt: skip
    if any("BatchNorm" in type(module).__name__ for module in encoder.modules()):
        raise UserError(f"{USE}, but the batch normalisation of {name} uses all of a batch; use another norm")
    like, training = next(encoder.parameters()), encoder.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        tokens = min(16, encoder.length)
        x = torch.randn(2, tokens, encoder.d_model).to(like)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=like.device)
        mask[1, tokens // 2 :] = False
        encoder.eval()
        try:
            whole = encoder(x, mask)
            parts: Tensor | None = _encode(encoder, x, mask, 0, len(_blocks(encoder)))
        except (TypeError, AttributeError):
            parts = None
        finally:
            encoder.train(training)
    if parts is None or not torch.equal(whole[mask], parts[mask]):
        raise UserError(f"{USE}, but {name} passes more than x from block to block; use ddp or fsdp")
    if encoder.aux_loss() is not None:
        raise UserError(f"{USE}, but the auxiliary loss of {name} depends on all tokens of a batch; use ddp")


def _blocks(encoder: Encoder) -> list[nn.Module]:
    return list(encoder.blocks)  # type: ignore[arg-type]


def _encode(encoder: Any, x: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
    """The blocks `first` to `last` of an encoder, with `enter` before the first block and `norm` after the last."""
    x, mask = clean_padding(x, mask, gaps=encoder.gaps and not encoder.causal)
    if first == 0:
        x = encoder.enter(x)
    for block in encoder.blocks[first:last]:
        x = block(x, mask)
    return encoder.norm(x) if last == len(encoder.blocks) else x


class Stage(nn.Module):
    """The blocks `first` to `last` of a classifier. The first stage also embeds; the last one pools and classifies."""

    def __init__(self, model: Classifier, first: int, last: int) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: values (B, L[, channels]) in the first stage, (B, L', D) in the others; mask: (B, L) bool."""
        model, encoder = self.model, self.model.encoder
        if self.first == 0:
            x = model.embed(x)
            if model.cls is not None:
                x = torch.cat([model.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        tokens = mask.shape[1]
        if model.cls is not None:
            mask = F.pad(mask, (1, 0), value=True)
        x = _encode(encoder, x, mask, self.first, self.last)
        if self.last < len(_blocks(encoder)):
            return x
        if model.per_position:
            return model.head(x[:, -tokens:])
        return model.head(model.pool(x, mask))


class Pipeline:
    """The loss of a classifier, computed in stages: `loss, output = pipeline(batch)`, the same on every process.

    The gradients of this process's stage are multiplied by the number of processes, and all others are 0. The mean over
    processes, which DDP computes, is then the gradient of one process. The model must pass `check`.
    """

    def __init__(self, model: Classifier, target: Target, rank: int, processes: int) -> None:
        self.model, self.target, self.rank, self.processes = model, target, rank, processes
        count = len(_blocks(model.encoder))
        bounds = [count * part // processes for part in range(processes + 1)]
        self.stage = Stage(model, bounds[rank], bounds[rank + 1])
        self.group: Any = None
        self._schedules: dict[tuple[int, int], Schedule1F1B] = {}
        self._scored = 1

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (), and the output of the model, which has no gradient. The number of rows of the batch must be a
        multiple of the number of processes."""
        return _Scheduled.apply(self, batch, *self.model.parameters())

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of all microbatches: loss and output. Gradients are added to `grad`."""
        values, mask, labels = batch.values[:, 0], batch.mask[:, 0], batch.labels
        if self.model.hides_zeros:
            mask = mask & F.pad(values[:, 1:] != 0, (1, 0), value=True)
        self._scored = self._count(labels)
        schedule = self._schedule(*mask.shape)
        losses: list[Tensor] = []
        inputs = (values,) if self.rank == 0 else ()
        last = self.rank == self.processes - 1
        output = schedule.step(*inputs, mask=mask, target=labels if last else None, losses=losses if last else None)
        like = next(self.model.parameters())
        width = self.target.outputs
        shape = (*mask.shape, width) if self.model.per_position else (len(mask), width)
        output = output.detach().to(like.dtype).contiguous() if last else like.new_empty(shape)
        loss = torch.stack(losses).sum().detach().to(like.dtype) if last else like.new_zeros(())
        for result in (loss, output):
            distributed.broadcast(result, self.processes - 1, group=self.group)
        return loss, output

    def _count(self, labels: Tensor) -> int:
        return int((labels != UNSCORED).sum()) if self.target.per_position else len(labels)

    def _loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """The contribution of a microbatch to the mean loss of the batch."""
        count = self._count(labels)
        return self.target.loss(output, labels) * (count / self._scored) if count else output.sum() * 0

    def _schedule(self, rows: int, tokens: int) -> Schedule1F1B:
        """The schedule for batches of one shape, because a stage exchanges tensors of one shape."""
        if (rows, tokens) in self._schedules:
            return self._schedules[rows, tokens]
        if self.group is None:
            self.group = distributed.new_group()
        parts = max(p for p in range(self.processes, 4 * self.processes + 1) if rows % p == 0)
        model, size = self.model, rows // parts
        like = next(model.parameters())
        length = tokens + (model.cls is not None)
        between = torch.empty(size, length, model.encoder.d_model, dtype=like.dtype, device="meta")
        shape = (size, tokens, self.target.outputs) if model.per_position else (size, self.target.outputs)
        final = torch.empty(shape, dtype=like.dtype, device="meta")
        stage = PipelineStage(
            self.stage, self.rank, self.processes, like.device, group=self.group,
            input_args=between if self.rank else None, output_args=between if self.rank < self.processes - 1 else final,
        )  # fmt: skip
        schedule = Schedule1F1B(stage, parts, loss_fn=self._loss, scale_grads=False)
        self._schedules[rows, tokens] = schedule
        return schedule


class _Scheduled(torch.autograd.Function):
    """Runs the schedule with its backward pass; differentiating the loss returns the gradients computed by it."""

    @staticmethod
    def forward(ctx: Any, pipeline: Pipeline, batch: Batch, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            loss, output = pipeline.run(batch)
        ctx.grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        ctx.processes = pipeline.processes
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        ctx.mark_non_differentiable(output)
        return loss, output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scale = grads[0] * ctx.processes
        return (None, None, *(grad * scale for grad in ctx.grads))
