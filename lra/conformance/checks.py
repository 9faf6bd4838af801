"""The conformance checks. Each builds small encoders and raises Broken with a message for the author of the layer.

The first line of a check's docstring is the property that it checks. Everything runs on the CPU, in float64 unless the
check is about another precision, at d_model 16, two layers and a few dozen tokens.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lra.config.match import build_on_meta
from lra.config.sections import Optim
from lra.conformance.context import (
    LAYERS,
    LENGTH,
    LONGEST,
    WIDTH,
    Broken,
    CheckContext,
    NotDeclared,
    cast,
    gap,
    inputs,
    outputs,
    reloaded,
    woken,
)
from lra.conformance.pytorch import EXACT, NEAR, PYTORCH
from lra.encoder import DIRECTIONS, SCALINGS, Card, Encoder, Mixer
from lra.errors import UserError, unknown
from lra.profiling.flops import encoder_flops
from lra.registry import architectures
from lra.training.optimisers import KEYS, parameter_groups

BATCHES = (1, 3)
SPLITS = 2

LONG = tuple(3 * 4**i for i in range(6, 10))
"""12,288 to 786,432 tokens: growth is judged beyond any window or number of landmarks."""


RECURRENCE = re.compile(
    r"(log_|time_)?(dt|step|A|decay|nu|theta|tau)(_log|_real|_imag|_re|_im|_bias)?|[Ll]ambda.*|recurrent_param|time_first"
)
"""Last names of parameters that set how long a recurrence remembers: step sizes, state matrices, decay rates."""
SPREAD = 10.0
"""Largest ratio between the outputs of two mixers of one encoder, at any of SHAPES."""
SHAPES = ((256, 4), (1024, 4), (4096, 2))
"""Length and layers: depth where a layer is cheap."""


def signature(context: CheckContext) -> None:
    """arguments of the constructor are named; a misspelt one fails"""
    parameters = inspect.signature(context.constructor.cls).parameters
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise Broken(f"argument {name} is {parameter.kind.description}; write `*,` first and no **{name}")
        if (parameter.default is parameter.empty) != (name in ("d_model", "n_layers", "length")):
            raise Broken(f"{name} must {'not ' if name in ('d_model', 'n_layers', 'length') else ''}have a default")
    for name in ("d_model", "n_layers", "length", "dropout"):
        if name not in parameters:
            raise Broken(f"the constructor takes no {name}; every encoder takes d_model, n_layers, length, dropout")
    if parameters["dropout"].default != 0:
        raise Broken(f"dropout is {parameters['dropout'].default} by default; the recipe sets it, so 0.0")
    built = context.encoder()
    wanted = {"d_model": WIDTH, "n_layers": LAYERS, "length": LONGEST, **context.options}
    for name in ("d_model", "n_layers", "length"):
        if (value := getattr(built, name, "missing")) != wanted[name]:
            raise Broken(f"encoder.{name} is {value}; the constructor was given {wanted[name]}")
    try:
        context.constructor.cls(**{**context.constructor.preset, **wanted}, no_such_argument=0)
    except TypeError:
        pass
    else:
        raise Broken("the constructor takes an argument that does not exist; pass on what its ** holds, or write no **")
    if built.direction not in DIRECTIONS:
        raise Broken(f"encoder.direction is {built.direction!r}; one of {', '.join(DIRECTIONS)}")


def card(context: CheckContext) -> None:
    """the card names paper and growth of work; variants can be built"""
    if not context.declares("card"):
        raise NotDeclared("no card; a file in architectures/ has one, with paper and growth")
    own = getattr(context.constructor.cls, "card", None)
    if not isinstance(own, Card):
        raise Broken("the class has no `card = Card(...)`")
    if not own.title.strip() or not 1940 <= own.year <= 2100:
        raise Broken(f"title {own.title!r} of {own.year}: the paper's title and the year of its first version")
    if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+/\S+", own.url):
        raise Broken(f"url is {own.url!r}; the https address of the paper")
    if own.scaling not in SCALINGS:
        raise Broken(f"scaling is {own.scaling!r}; one of {', '.join(SCALINGS)}")
    if not context.options and not context.constructor.preset and own.scaling != (default := context.encoder().scaling):
        raise Broken(f"scaling is {own.scaling!r}, but that of an encoder with no other arguments {default!r}")
    for key, reason in own.exempt.items():
        variant, _, name = key.rpartition("/")
        if name not in CHECKS:
            raise Broken(f"exempt: {unknown('check', name, CHECKS)}")
        if variant and variant not in own.variants:
            raise Broken(f"exempt: {unknown('variant', variant, own.variants)}")
        if not reason.strip():
            raise Broken(f"the exemption from {key} gives no reason")
    if ":" not in context.constructor.name:
        try:
            architectures.facts(context.constructor.name.partition("/")[0])
        except UserError as error:
            raise Broken(str(error)) from None
    for variant, preset in own.variants.items():
        try:
            replace(context, constructor=replace(context.constructor, preset=preset)).encoder()
        except (UserError, TypeError) as error:
            raise Broken(f"variant {variant!r} cannot be built: {error}") from None


def shape(context: CheckContext) -> None:
    """input and output are (B, L, D), also for one token, odd lengths"""
    for how, encoder in context.directions():
        for lengths, total in (([32, 32], 32), ([1], 1), ([7, 3, 1], 7), ([31, 17], 31), ([33], 33), ([64, 64], 64)):
            x, mask = inputs(lengths, total)
            y = encoder(x, mask)
            if y.shape != x.shape or y.dtype != x.dtype:
                got = f"{tuple(y.shape)} {y.dtype}"
                raise Broken(f"{how}{tuple(x.shape)} {x.dtype} became {got}; shape and dtype must stay")
            if not y[mask].isfinite().all():
                raise Broken(f"{how}outputs are not finite for {tuple(x.shape)} with {lengths} real tokens")


def padding(context: CheckContext) -> None:
    """outputs at real positions do not depend on values of padding"""
    x, mask = inputs([LENGTH, 17, 1], LENGTH)
    other = torch.where(mask.unsqueeze(-1), x, 100 * x.flip(1))
    for how, encoder in context.directions():
        if (change := gap(outputs(encoder, other, mask), outputs(encoder, x, mask))) > EXACT:
            raise Broken(
                f"{how}outputs at real positions changed by {change:.2g} when the padding's content changed: "
                "your layer reads padded positions; take the argument `mask` (True = real) and use it"
            )


def padding_length(context: CheckContext) -> None:
    """outputs at real positions do not depend on the amount of padding"""
    x, mask = inputs([17, 11, 1], LONGEST)
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    for how, encoder in context.directions():
        expected = outputs(encoder, x, mask)[:, :17]
        for total in (17, 18, LENGTH, 43):
            if (change := gap(outputs(encoder, x[:, :total], mask[:, :total])[:, :17], expected)) > EXACT:
                raise Broken(
                    f"{how}outputs of 17 real tokens changed by {change:.2g} between {total} and {LONGEST} positions: "
                    "your layer depends on the padded length; take lengths from the mask"
                )


def batch(context: CheckContext) -> None:
    """the output of a sequence does not depend on its batch"""
    x, mask = inputs([LENGTH, 17, 5], LENGTH)
    order = torch.tensor([2, 0, 1])
    for how, encoder in context.directions():
        for training in (False, True):
            encoder.train(training)
            together, mode = outputs(encoder, x, mask), f"in {'training' if training else 'evaluation'} mode"
            if training and gap(outputs(encoder, x, mask, seed=1), together) > EXACT:
                continue  # it draws random numbers when training, and draws others for another batch
            if (change := gap(outputs(encoder, x[order], mask[order]), together[order])) > EXACT:
                raise Broken(
                    f"{how}outputs changed by {change:.2g} when the batch was reordered, {mode}: state is shared"
                )
            alone = torch.cat([outputs(encoder, x[i : i + 1], mask[i : i + 1]) for i in range(3)])
            if (change := gap(alone, together)) > EXACT:
                raise Broken(
                    f"{how}a sequence alone and in a batch differs by {change:.2g}, {mode}: "
                    "your layer mixes sequences, as batch normalisation does"
                )


def gradients(context: CheckContext) -> None:
    """every parameter receives a gradient"""
    x, mask = inputs([LENGTH, 17, 9], LENGTH)
    for how, encoder in context.directions():
        y, extra = encoder.train()(x, mask), encoder.aux_loss()
        loss = (y * torch.randn_like(y))[mask].sum()
        (loss if extra is None else loss + extra).backward()
        trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
        idle = [name for name, grad in trained.items() if grad is None or not grad.any()]
        wild = [name for name, grad in trained.items() if grad is not None and not grad.isfinite().all()]
        if wild:
            raise Broken(f"{how}the gradient of {', '.join(wild[:3])} is not finite")
        if idle:
            names = f"{len(idle)} of {len(trained)} parameters get no gradient: {', '.join(idle[:3])}"
            raise Broken(f"{how}{names}; they never learn")


def _reach(encoder: Encoder) -> tuple[float, float]:
    """Largest change of outputs before, and after, a token when that token changes."""
    x, mask = inputs([LENGTH, LENGTH], LENGTH)
    before, after, plain = 0.0, 0.0, outputs(encoder, x, mask)
    for t in (1, LENGTH // 2, LENGTH - 2):
        changed = x.clone()
        changed[:, t] = x.flip(-1)[:, t]
        y = outputs(encoder, changed, mask)
        before, after = max(before, gap(y[:, :t], plain[:, :t])), max(after, gap(y[:, t + 1 :], plain[:, t + 1 :]))
    return before, after


def causal(context: CheckContext) -> None:
    """outputs see later tokens if and only if the direction says so"""
    if not context.declares("direction"):
        before, after = _reach(context.encoder())
        seen = [name for name, change in (("the past", after), ("the future", before)) if change > EXACT]
        raise NotDeclared(f"direction not declared; measured: a token sees {' and '.join(seen) or 'itself alone'}")
    encoders = context.directions()
    if context.card.causal and "direction" in context.constructor.options() and not any(e.causal for _, e in encoders):
        raise Broken('the card says causal=True, but direction="causal" is refused')
    for how, encoder in encoders:
        before, _ = _reach(encoder)
        if encoder.causal and before > EXACT:
            raise Broken(
                f"{how}outputs before a token changed by {before:.2g} when that token changed: "
                "your layer sees the future, but its direction is causal"
            )
        if not encoder.causal and before <= EXACT:
            raise Broken(f"{how}direction is {encoder.direction!r}, but no output depends on a later token")


def step(context: CheckContext) -> str | None:
    """step and chunk give the same outputs as forward"""
    if not context.declares("step"):
        raise NotDeclared("recurrent mode not declared")
    x, mask = inputs([LENGTH, LENGTH], LENGTH)
    encoder = next((e for _, e in context.directions() if e.causal), context.encoder())
    try:
        state = encoder.init_state(len(x))
    except NotImplementedError:
        return "no recurrent mode: init_state is not implemented"
    start = tree_map_only(Tensor, lambda t: cast(t, torch.float64), state)
    expected, state = outputs(encoder, x, mask), start
    torch.manual_seed(0)
    for t in range(LENGTH):
        with torch.no_grad():
            y, state = encoder.step(x[:, t], state)
        if y.shape != x[:, t].shape:
            raise Broken(f"step returned {tuple(y.shape)} for a token of shape {tuple(x[:, t].shape)}")
        if (error := (y - expected[:, t]).abs().max().item()) > EXACT:
            raise Broken(f"step and forward differ by {error:.2g} at token {t} (float64): one of them is wrong")
    for number in range(SPLITS):
        _chunks(encoder, x, expected, start, number)
    return None


@torch.no_grad()
def _chunks(encoder: Encoder, x: Tensor, expected: Tensor, state: Any, number: int) -> None:
    """Compare chunks between random cuts with forward; from the second split on, chunks and steps alternate."""
    draw = torch.Generator().manual_seed(number)
    places = torch.randperm(LENGTH - 1, generator=draw)[:4].add(1).sort().values.tolist()
    for first, last in pairwise([0, *places, LENGTH]):
        middle = first + (1 if number else 0)
        parts = []
        if middle > first:
            y, state = encoder.step(x[:, first], state)
            parts.append(y.unsqueeze(1))
        if middle < last:
            y, state = encoder.chunk(x[:, middle:last], state)
            parts.append(y)
        y = torch.cat(parts, dim=1)
        if y.shape != x[:, first:last].shape:
            raise Broken(f"chunk returned {tuple(y.shape)} for tokens of shape {tuple(x[:, first:last].shape)}")
        if not (found := (y - expected[:, first:last]).abs().max().item()) <= EXACT:
            raise Broken(
                f"chunk and forward differ by {found:.2g} in tokens {first} to {last - 1} (float64), cut at "
                f"{', '.join(map(str, places))}: chunk starts from the state or leaves it wrongly"
            )


def cost(context: CheckContext) -> None:
    """cost(length) agrees with the FLOP counter at two batch sizes"""
    if not context.declares("cost"):
        raise NotDeclared("cost not declared; FLOPs are those PyTorch's dispatcher counts")
    for how, encoder in context.directions(torch.float32, length=128):
        for length, batch in ((32, 1), (64, 3), (128, 1)):
            _agrees(encoder, length, batch, how)
        _splits(encoder, 128, how)
    if context.constructor.declared:
        built = [build_on_meta(partial(context.encoder, torch.float32, length=n, n_layers=1)) for n in LONG]
        observed = growth([encoder.cost(n).total for n, encoder in zip(LONG, built, strict=True)])
        if built[0].scaling in SCALINGS and observed != built[0].scaling:
            raise Broken(f"work is declared to grow as {built[0].scaling}, but cost grows as {observed}")


def growth(work: Sequence[float]) -> str:
    """Which of SCALINGS the work at lengths LONG follows, by its fastest part, however small the share of it.

    Differences of what a token adds, (work(4 n) - work(n)) / n, hold neither fixed nor linear work. From one to the
    next they grow 1, 2 and 4 times for L log L, L sqrt L and L^2.
    """
    added = [(after - before) / n for n, before, after in zip(LONG, work, work[1:], strict=False)]
    one, two = (after - before for before, after in pairwise(added))
    if max(abs(one), abs(two)) < 1e-3 * added[0]:
        return SCALINGS[0]
    place = 1 + round(math.log2(two / one)) if min(one, two) > 0 else 0
    return SCALINGS[place] if 1 <= place < len(SCALINGS) else f"none of {', '.join(SCALINGS)}"


def _agrees(encoder: Encoder, length: int, batch: int, how: str) -> None:
    report = encoder_flops(encoder, batch, length, device="", backward=False)
    declared = encoder.cost(length).of_batch(batch)
    words = f"{how}cost({length}).of_batch({batch})"
    if abs(declared.matmul - report.products) > 0.01 * max(report.products, 1.0):
        ratio = declared.matmul / max(report.products, 1.0)
        raise Broken(
            f"{words}.matmul is {declared.matmul:,.0f}, {ratio:.3g} times what was counted in matrix products: "
            f"{report.products:,.0f} (a multiply-add is 2)"
        )
    if declared.other < 0.99 * report.kernels:
        raise Broken(f"{words}.other is {declared.other:,.0f}; the kernels alone took {report.kernels:,.0f}")
    if declared.total < 0.5 * report.forward:
        raise Broken(f"{words}.total is {declared.total:,.0f}; counted were {report.forward:,.0f}")


def _splits(encoder: Encoder, length: int, how: str) -> None:
    """Check the division of the work into work per batch and work per sequence."""
    one, more = (encoder_flops(encoder, n, length, device="", backward=False).forward for n in BATCHES)
    once = (BATCHES[1] * one - BATCHES[0] * more) / (BATCHES[1] - BATCHES[0])
    declared = encoder.cost(length)
    shared = declared.batch_matmul + declared.batch_other
    if abs(shared - once) > 0.2 * max(declared.total, one):
        raise Broken(
            f"{how}cost({length}) declares {shared:,.0f} as done once for a batch; counted were {once:,.0f} of "
            f"{one:,.0f} at a batch of one: charge the kernels that sequences share with Cost.per_batch"
        )


def save(context: CheckContext) -> None:
    """reloaded in a fresh process: the same outputs, bit for bit"""
    fault = reloaded([context])[0]
    if fault:
        raise Broken(fault)


def precision(context: CheckContext) -> None:
    """bfloat16 autocast stays finite and near float32"""
    encoder = woken(context.encoder(torch.float32))
    x, mask = inputs([LENGTH, 17], LENGTH, torch.float32)
    expected = outputs(encoder, x, mask)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = encoder(x, mask).float().masked_fill(~mask.unsqueeze(-1), 0)
        y.square().mean().backward()
    off = ((y - expected).square().mean() / expected.square().mean()).sqrt().item()
    if not math.isfinite(off):
        raise Broken("outputs under bfloat16 autocast are not finite: keep sums, exponentials and norms in float32")
    if off > NEAR:
        raise Broken(f"bfloat16 autocast moves outputs by {100 * off:.2g} %: keep long sums and phases in float32")
    if any(p.grad is not None and not p.grad.isfinite().all() for p in encoder.parameters()):
        raise Broken("gradients under bfloat16 autocast are not finite")


def optim(context: CheckContext) -> None:
    """every optimiser pattern applies to a parameter"""
    encoder = context.encoder()
    names, patterns = [name for name, _ in encoder.named_parameters()], dict(encoder.optim)
    winners = {next((p for p in patterns if fnmatchcase(name, p)), None) for name in names}
    for pattern, settings in patterns.items():
        for key, value in settings.items():
            if key not in KEYS:
                raise Broken(f"optim[{pattern!r}]: {unknown('setting', key, KEYS)}")
            if not (math.isfinite(value) and value >= 0):
                raise Broken(f"optim[{pattern!r}] sets {key} to {value}; a number of at least 0")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise Broken(f"optim pattern {pattern!r} matches no parameter; they are called {', '.join(names[:3])}, ...")
        if pattern not in winners:
            raise Broken(f"optim pattern {pattern!r} never applies: an earlier one matches all its parameters")


def _decayed(context: CheckContext) -> tuple[list[str], list[str]]:
    """Names of an encoder's parameters that a recipe with `optim.decay = "all"` decays: those of its recurrence, and
    biases, norms and skips (D). Both are empty for an encoder without a recurrence by these names: there such a recipe
    is taken at its word, as LRA's own optimiser decays every parameter."""
    encoder = context.encoder(torch.float32)
    try:
        groups = parameter_groups(encoder, encoder, Optim(weight_decay=0.1, decay="all"))
    except UserError:
        return [], []  # the check of the patterns reports the fault
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    norms = {id(p) for module in encoder.modules() if "Norm" in type(module).__name__ for p in module.parameters()}
    recurrence, rest, any_recurrence = [], [], False
    for name, p in encoder.named_parameters():
        last = name.rpartition(".")[2]
        if RECURRENCE.fullmatch(last) or (p.ndim == 1 and last in ("u", "w")):
            any_recurrence = True
            recurrence += [name] if id(p) in decayed else []
        elif id(p) in decayed and (id(p) in norms or "norm" in last or last in ("d", "D") or last.endswith("bias")):
            rest.append(name)
    return (recurrence, rest) if any_recurrence else ([], [])


def optim_groups(context: CheckContext) -> None:
    """step sizes and state matrices are never decayed"""
    recurrence, _ = _decayed(context)
    if recurrence:
        raise Broken(
            f'a recipe with optim.decay = "all" decays {", ".join(recurrence[:3])}: '
            "give what sets the memory of a recurrence `weight_decay: 0.0` in `optim`"
        )


def optim_norms(context: CheckContext) -> None:
    """skips, biases and norms beside a recurrence are never decayed"""
    _, rest = _decayed(context)
    if rest:
        raise Broken(
            f'a recipe with optim.decay = "all" decays {", ".join(rest[:3])}: give the skip, biases and norms '
            "`weight_decay: 0.0` in `optim`, or say on the card whose optimiser decays them"
        )


def magnitudes(context: CheckContext) -> None:
    """mixers have outputs of similar size at every depth and length"""
    sizes: list[tuple[float, str]] = []

    def note(place: str, module: nn.Module, given: Any, y: Tensor) -> None:
        sizes.append((y.square().mean().sqrt().item(), place))

    for length, layers in SHAPES:
        encoder, before = woken(context.encoder(torch.float32, length=length, n_layers=layers)), len(sizes)
        for name, mixer in _mixers(encoder).items():
            mixer.register_forward_hook(partial(note, f"{name} at {length} tokens"))
        x = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(7))
        y = outputs(encoder, x, torch.ones(1, length, dtype=torch.bool))
        if len(sizes) == before:  # no mixers, or an encoder that calls their parts itself
            note(f"the encoder at {length} tokens", encoder, x, y)
    first, place = sizes[0]
    for size, where in sizes:
        if not first / SPREAD <= size <= first * SPREAD:
            raise Broken(
                f"outputs of {where} have RMS {size:.3g}, those of {place} {first:.3g}: "
                "in a residual stack one layer drowns the others; scale the output or its initialisation"
            )


def _mixers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The outermost mixers by name, in order."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= {prefix + name: child} if isinstance(child, Mixer) else _mixers(child, f"{prefix}{name}.")
    return found


def trains(context: CheckContext) -> None:
    """twenty steps on a copy task lower the loss"""
    encoder = context.encoder(torch.float32).train()
    draw = torch.Generator().manual_seed(3)
    table, readout = torch.randn(8, WIDTH, generator=draw), torch.randn(WIDTH, 8, generator=draw) / WIDTH**0.5
    rates = [
        next((dict(s) for p, s in encoder.optim.items() if fnmatchcase(name, p)), {})
        for name, _ in encoder.named_parameters()
    ]
    groups = [
        {"params": [p], "lr": min(own.get("lr", 0.01), 0.01 * own.get("lr_scale", 1.0))}
        for p, own in zip(encoder.parameters(), rates, strict=True)
    ]
    optimizer, losses = torch.optim.Adam(groups, lr=0.01), []
    for _ in range(20):
        tokens = torch.randint(8, (8, LENGTH), generator=draw)
        y, extra = encoder(table[tokens], torch.ones(8, LENGTH, dtype=torch.bool)), encoder.aux_loss()
        loss = F.cross_entropy((y @ readout).flatten(0, 1), tokens.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    if not last < 0.9 * first:
        raise Broken(f"the loss went from {first:.3f} to {last:.3f} in 20 steps: gradients or initialisation are wrong")


def seed(context: CheckContext) -> None:
    """one seed gives the same weights and outputs twice"""
    x, mask = inputs([LENGTH, 17], LENGTH)
    one, two = context.encoder(), context.encoder()
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        if not torch.equal(a, b):
            raise Broken(f"{name} differs between two encoders of one seed: draw it from torch's own generator")
    for training in (False, True):
        ys = [outputs(encoder.train(training), x, mask) for encoder in (one, one, two)]
        if any(not torch.equal(y, ys[0]) for y in ys[1:]):
            raise Broken("outputs of one seed differ: randomness must come from torch's own generator")


CHECKS: dict[str, Callable[[CheckContext], str | None]] = {
    f.__name__: f
    for f in (
        signature, card, shape, padding, padding_length, batch, gradients, causal, step, cost, save, precision, optim,
        optim_groups, optim_norms, magnitudes, trains, seed,
    )
} | PYTORCH  # fmt: skip
