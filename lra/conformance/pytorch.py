"""Checks that an encoder works with features of PyTorch: checkpointing, autocast, compile, export and others.

Outputs and gradients are compared with those of a plain call. Everything runs on the CPU, in float64 unless the check
is about another precision.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lra.conformance.context import LENGTH, LONGEST, WIDTH, Broken, CheckContext, gap, inputs, outputs, woken
from lra.encoder import Encoder, lengths_of

EXACT = 1e-8
"""Largest difference, over the RMS of the expected values, that float64 arithmetic in another order may make."""
SHAPES = ([16, 9], 16), ([11, 6, 2], 11)
"""Real tokens in each row, and length, of the batches that one graph is made for."""
NEAR = 0.03
"""Largest RMS difference that autocast may make, over the RMS of the float32 output."""
NEAR_MODULE = 0.1
"""The same of a module converted to bfloat16, whose residual stream is rounded too."""


def _loss(y: Tensor, mask: Tensor) -> Tensor:
    """A weighted sum of the outputs at real positions; the first rows have the same weights in every batch."""
    weight = torch.randn(4, LONGEST, WIDTH, generator=torch.Generator().manual_seed(11))
    return (y * weight[: len(y), : y.shape[1]].to(y.dtype)).masked_fill(~mask.unsqueeze(-1), 0).sum()


def _gradients(encoder: Encoder, x: Tensor, mask: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
    """Gradients of `_loss` by all parameters, in one vector. call: what is called instead of the encoder."""
    encoder.zero_grad()
    torch.manual_seed(0)
    _loss((call or encoder)(x, mask), mask).backward()
    return _vector(encoder, {name: p.grad for name, p in encoder.named_parameters()})


def _vector(encoder: Encoder, gradients: Mapping[str, Tensor | None]) -> Tensor:
    parts = [torch.zeros_like(p) if (g := gradients[n]) is None else g for n, p in encoder.named_parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def padding_nan(context: CheckContext) -> None:
    """NaN in the padding reaches no output and no gradient"""
    x, mask = inputs([LENGTH, 17, 1], LENGTH)
    x, spoilt = (x.masked_fill(~mask.unsqueeze(-1), value) for value in (0.0, torch.nan))
    for how, encoder in context.directions():
        if gap(outputs(encoder, spoilt, mask), outputs(encoder, x, mask)) > EXACT:
            raise Broken(f"{how}outputs at real positions change if the padding holds NaN: {CLEAN}")
        if gap(_gradients(encoder, spoilt, mask), _gradients(encoder, x, mask)) > EXACT:
            raise Broken(f"{how}gradients change if the padding holds NaN (0 times NaN is NaN): {CLEAN}")


def padding_row(context: CheckContext) -> None:
    """a row of padding alone changes no other row and no gradient"""
    x, mask = inputs([LENGTH, 17, 0], LENGTH)
    for how, encoder in context.directions():
        together = outputs(encoder, x, mask)[:2]
        if (change := gap(together, outputs(encoder, x[:2], mask[:2]))) > EXACT:
            raise Broken(f"{how}outputs change by {change:.2g} if a row of the batch is all padding: {CLEAN}")
        if (change := gap(_gradients(encoder, x, mask), _gradients(encoder, x[:2], mask[:2]))) > EXACT:
            raise Broken(f"{how}gradients change by {change:.2g} if a row of the batch is all padding: {CLEAN}")


CLEAN = "start forward with `x, mask = clean_padding(x, mask)` of lra.encoder"


def padding_left(context: CheckContext) -> str | None:
    """left padding is an error, or gives the outputs of right padding"""
    x, mask = inputs([LENGTH, 17, 5], LENGTH)
    encoder = woken(context.encoder())
    if encoder.gaps and not encoder.causal:
        return "it takes masks with gaps; positions count from the start of the row"
    expected = outputs(encoder, x, mask)
    shift = (LENGTH - lengths_of(mask)).tolist()
    left_x, left_mask = (torch.stack([r.roll(n, 0) for r, n in zip(t, shift, strict=True)]) for t in (x, mask))
    try:
        y = outputs(encoder, left_x, left_mask)
    except Exception as error:
        if "padd" not in str(error):
            raise
        return None
    back = torch.stack([row.roll(-n, 0) for row, n in zip(y, shift, strict=True)])
    if (change := gap(back, expected)) > EXACT:
        raise Broken(f"left padding is accepted and changes outputs by {change:.2g}: {CLEAN}")
    return None


def one_token(context: CheckContext) -> None:
    """a batch of one token has finite outputs and gradients"""
    x, mask = inputs([1], 1)
    for how, encoder in context.directions():
        if not (outputs(encoder.train(), x, mask).isfinite().all() and _gradients(encoder, x, mask).isfinite().all()):
            raise Broken(f"{how}outputs or gradients of a batch of one token are not finite")


def checkpointing(context: CheckContext) -> None:
    """gradient checkpointing, of both kinds, keeps the gradients"""
    x, mask = inputs([LENGTH, 17], LENGTH)
    encoder = woken(context.encoder()).train()
    expected = _gradients(encoder, x, mask)
    for reentrant in (False, True):
        leaf = x.clone().requires_grad_()  # the reentrant kind needs an input with a gradient
        found = _gradients(encoder, leaf, mask, lambda *a, r=reentrant: checkpoint(encoder, *a, use_reentrant=r))
        if (change := gap(found, expected)) > EXACT:
            raise Broken(f"use_reentrant={reentrant}: gradients under checkpointing differ by {change:.2g}")


def meta(context: CheckContext) -> None:
    """built on the meta device, then loaded: the same outputs"""
    x, mask = inputs([LENGTH, 17], LENGTH)
    encoder = context.encoder()
    with torch.device("meta"):
        twin = context.encoder()
    # as `to_empty`, with memory that is sure to hold garbage
    twin._apply(lambda t: torch.full_like(t, float("nan") if t.is_floating_point() else 77, device="cpu"))
    twin.load_state_dict(encoder.state_dict())
    try:
        change = gap(outputs(twin, x, mask), outputs(encoder, x, mask))
    except (RuntimeError, IndexError):  # a table of indices holds anything
        change = math.inf
    if change > EXACT:
        raise Broken(
            "built on the meta device, then to_empty and load_state_dict: outputs differ, because a table is in no "
            "state dict and stays uninitialised: keep it in a Table, or make its buffer persistent"
        )


def copies(context: CheckContext) -> None:
    """deepcopy and pickle give the same encoder, after training too"""
    x, mask = inputs([LENGTH, 17], LENGTH)
    encoder = context.encoder().train()
    _gradients(encoder, x, mask)
    expected = outputs(encoder.eval(), x, mask)
    for how, copied in (("deepcopy", copy.deepcopy), ("pickle", lambda e: pickle.loads(pickle.dumps(e)))):
        try:
            twin = copied(encoder)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise Broken(f"{how} failed after a training step: {reason}") from error
        if (change := gap(outputs(twin, x, mask), expected)) > EXACT:
            raise Broken(f"outputs of a copy by {how} differ by {change:.2g}")


def functional(context: CheckContext) -> None:
    """torch.func.grad gives the gradients of backward()"""
    x, mask = inputs([LENGTH, 17], LENGTH)
    encoder = woken(context.encoder()).train()
    expected = _gradients(encoder, x, mask)
    torch.manual_seed(0)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}
    found = torch.func.grad(lambda p: _loss(functional_call(encoder, p, (x, mask)), mask))(parameters)
    if (change := gap(_vector(encoder, found), expected)) > EXACT:
        raise Broken(f"gradients of torch.func.grad differ by {change:.2g} from those of backward()")


def inference(context: CheckContext) -> None:
    """inference_mode gives the same outputs; training works after it"""
    x, mask = inputs([LENGTH, 17], LENGTH)
    encoder = context.encoder()
    with torch.inference_mode():
        y = outputs(encoder, x, mask)
    try:
        _gradients(encoder.train(), x, mask)
    except RuntimeError as error:
        raise Broken(f"a training step after torch.inference_mode failed: {error}") from error
    if gap(outputs(encoder.eval(), x, mask), y) > EXACT:
        raise Broken("outputs under torch.inference_mode differ")


def bfloat16(context: CheckContext) -> None:
    """outputs of a bfloat16 module are finite and near float32"""
    x, mask = inputs([LENGTH, 17], LENGTH, torch.float32)
    low = woken(context.encoder(torch.float32)).to(torch.bfloat16)
    exact = context.encoder(torch.float32)
    exact.load_state_dict(low.state_dict())
    y = low(x.bfloat16(), mask)
    if y.dtype != torch.bfloat16:
        raise Broken(f"a bfloat16 module with bfloat16 input returned {y.dtype}")
    _compare(low, y, outputs(exact, x.bfloat16().float(), mask), mask, "as a bfloat16 module", NEAR_MODULE)


def float16(context: CheckContext) -> None:
    """outputs under float16 autocast are finite and near float32"""
    x, mask = inputs([LENGTH, 17], LENGTH, torch.float32)
    encoder = woken(context.encoder(torch.float32))
    expected = outputs(encoder, x, mask)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.float16):
        y = encoder(x, mask)
    _compare(encoder, y, expected, mask, "under float16 autocast", NEAR)


def _compare(encoder: Encoder, y: Tensor, expected: Tensor, mask: Tensor, where: str, near: float) -> None:
    y = y.float().masked_fill(~mask.unsqueeze(-1), 0)
    y.square().mean().backward()
    if not y.isfinite().all():
        raise Broken(f"outputs {where} are not finite: constants beyond 65,504, or sums that need float32")
    if any(p.grad is not None and not p.grad.isfinite().all() for p in encoder.parameters()):
        raise Broken(f"gradients {where} are not finite")
    off = ((y - expected).square().mean() / expected.square().mean()).sqrt().item()
    if off > near:
        raise Broken(f"outputs {where} are off by {100 * off:.2g} %: keep long sums and phases in float32")


def compiles(context: CheckContext) -> None:
    """torch.compile with any batch and length: the same outputs"""
    encoder = context.encoder(n_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="eager", dynamic=True)
    for lengths, total in SHAPES:
        x, mask = inputs(lengths, total)
        if (change := gap(_real(compiled, x, mask), outputs(encoder, x, mask))) > EXACT:
            raise Broken(f"compiled outputs differ by {change:.2g} for {tuple(x.shape)}")
    torch.compiler.reset()


def exports(context: CheckContext) -> None:
    """torch.export with any batch and length: the same outputs"""
    encoder = context.encoder(n_layers=1)
    # PyTorch compiles sizes of 0 and 1 apart, and here the sizes next to them
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=4, max=LONGEST)
    dynamic = ({0: batch, 1: length},) * 2
    with torch.no_grad():
        program = torch.export.export(encoder, inputs(*SHAPES[0]), dynamic_shapes=dynamic, strict=False)
    for lengths, total in SHAPES:
        x, mask = inputs(lengths, total)
        if (change := gap(_real(program.module(), x, mask), outputs(encoder, x, mask))) > EXACT:
            raise Broken(f"exported outputs differ by {change:.2g} for {tuple(x.shape)}")


@torch.no_grad()
def _real(call: Callable[..., Tensor], x: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(0)
    return call(x, mask).masked_fill(~mask.unsqueeze(-1), 0)


PYTORCH: dict[str, Callable[[CheckContext], str | None]] = {
    f.__name__: f
    for f in (
        padding_nan, padding_row, padding_left, one_token, checkpointing, meta, copies, functional, inference,
        bfloat16, float16, compiles, exports,
    )
}  # fmt: skip
