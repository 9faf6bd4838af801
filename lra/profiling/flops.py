"""Work of a module, counted where PyTorch dispatches its operators: what was counted, and what was not.

    counted       matrix products, convolutions, attention, recurrent layers (`matmul`); FFTs, cumulative sums, solves;
                  operators that registered a formula with torch.utils.flop_counter, as `kernels/` does
    elementwise   pointwise work, reductions, softmax, norms, data movement: elements touched, no FLOPs assigned
    uncounted     any other operator that touched data: its work is unknown, and a result lists it

One multiply-add is 2 FLOPs, a complex one 8. A causal mask does not shrink attention: what is computed counts; what it
throws away is left out of `algorithmic` alone. Our own operators count the pairs their pattern names. Attention's
backward is twice its forward, recomputation left out, so that no choice of kernel moves the number.
"""

from __future__ import annotations

import copy
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from math import log2, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from lra.encoder import Cost, Encoder

aten = torch.ops.aten
Shape = tuple[int, ...]


def _counting_complex(op: Any) -> Callable[..., float]:
    dense = flop_registry[op]

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> float:
        is_complex = any(isinstance(t, Tensor) and t.is_complex() for t in args)
        return dense(*args, out_val=out_val, **kwargs) * (4 if is_complex else 1)

    formula._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode's own mark: hand over tensors, not shapes
    return formula


def _product(a: Shape, b: Shape, *_: Any, **__: Any) -> float:
    """mv, dot, vdot: every element of `a` meets one of `b`."""
    return 2.0 * prod(a)


def _grouped_mm(a: Shape, b: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(a[1:] if len(a) > len(b) else a) * b[-1]


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: int, mask: Any, **_: Any,
) -> float:  # fmt: skip
    # torch's own formula ignores groups here and overstates a depthwise convolution by the number of channels
    spatial = x[2:] if transposed else grad[2:]
    return 2.0 * grad[0] * prod(spatial) * prod(weight) * (bool(mask[0]) + bool(mask[1]))


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(q, k, v))


def _attention_backward(_grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * _attention(q, k, v)


def _mkldnn_rnn(x: Shape, w: Shape, u: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(x[:-1]) * (prod(w) + prod(u))


def _mkldnn_rnn_backward(x: Shape, w: Shape, u: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * _mkldnn_rnn(x, w, u)


def _cudnn_rnn(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> float:
    return 2.0 * prod(x[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _cudnn_rnn_backward(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> float:
    return 2.0 * _cudnn_rnn(x, weights)


def _fft_real(size: Shape, dims: list[int]) -> float:
    return 2.5 * prod(size) * log2(prod(size[d] for d in dims))


def _fft_r2c(x: Shape, dims: list[int], *_: Any, **__: Any) -> float:
    return _fft_real(x, dims)


def _fft_c2r(_x: Shape, dims: list[int], *_: Any, out_shape: Shape, **__: Any) -> float:
    return _fft_real(out_shape, dims)


def _fft_c2c(x: Shape, dims: list[int], *_: Any, **__: Any) -> float:
    return 2 * _fft_real(x, dims)


def _one_each(x: Shape, *_: Any, **__: Any) -> float:
    return float(prod(x))


def _triangular_solve(a: Shape, b: Shape, *_: Any, left: bool = True, **__: Any) -> float:
    return float(prod(b) * (b[-2] if left else b[-1]))


def _factor(a: Shape, *_: Any, **__: Any) -> float:
    return 2.0 / 3.0 * prod(a) * a[-1]


def _solve(a: Shape, b: Shape, *_: Any, left: bool = True, **__: Any) -> float:
    """General systems of a matrix a: LU, then two triangular solves for each column of b, (..., n) or (..., n, k)."""
    return _factor(a) + 2.0 * prod(b) * a[-1]


def _lu_solve(lu: Shape, _pivots: Shape, b: Shape, *_: Any, **__: Any) -> float:
    return 2.0 * prod(b) * lu[-1]


def _matrix_exp(a: Shape, *_: Any, **__: Any) -> float:
    """Exponentials of square matrices: scaling and squaring takes some 15 products of n x n matrices."""
    return 30.0 * prod(a) * a[-1]


def _eigenvalues(a: Shape, *_: Any, **__: Any) -> float:
    """Eigenvalues and eigenvectors of general square matrices by the QR algorithm: about 25 n^3."""
    return 25.0 * prod(a) * a[-1]


DENSE = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
_HEAVY: dict[Any, Callable[..., float]] = {
    **{op: _counting_complex(op) for op in DENSE},
    aten.mv: _product,
    aten.dot: _product,
    aten.vdot: _product,
    aten._grouped_mm: _grouped_mm,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _mkldnn_rnn,
    aten.mkldnn_rnn_layer_backward: _mkldnn_rnn_backward,
    aten._cudnn_rnn: _cudnn_rnn,
    aten._cudnn_rnn_backward: _cudnn_rnn_backward,
}
FORMULAS: dict[Any, Callable[..., float]] = {
    **_HEAVY,
    aten._fft_r2c: _fft_r2c,
    aten._fft_c2r: _fft_c2r,
    aten._fft_c2c: _fft_c2c,
    aten.cumsum: _one_each,
    aten.cumprod: _one_each,
    aten.logcumsumexp: _one_each,
    aten.linalg_solve_triangular: _triangular_solve,
    aten._linalg_solve_ex: _solve,
    aten.linalg_lu_factor: _factor,
    aten.linalg_lu_factor_ex: _factor,
    aten.linalg_lu_solve: _lu_solve,
    aten.linalg_matrix_exp: _matrix_exp,
    aten.linalg_eig: _eigenvalues,
}
MATMUL = frozenset(_HEAVY) | frozenset(op for op in flop_registry if str(op).startswith("aten."))

PRODUCTS: dict[str, Callable[..., bool]] = {
    "lra.band_attention": lambda *_: True,
    "lra.expert_mlp": lambda *_: True,
    "lra.recurrent_cell": lambda _, U, *__: U.ndim > 1,
}
"""Our own operators whose work is that of matrix products, which architectures declare as `Cost.matmul`, and for which
arguments: a cell with one recurrent weight per unit has none. The work of all others belongs to `Cost.other`."""

LIGHT = re.compile(
    r""".*(softmax|norm|dropout|pool|embedding|sigmoid|relu|elu|median|_loss|loss_|split|detach|scatter).*
    | .*pad\dd.* | .*pad_nd | .*(like|_copy) | .*_thnn_fused_.* | (_?unsafe_)?(index|view|masked)\w*
    | (_local|is|_is|_assert|_has)_\w* | (new|view_as|tril|triu|diag|gather|select|slice|unfold|fill|zero|std|var)\w*
    | (lerp|hist|empty|resize|repeat|put|take|rand|normal|uniform|bernoulli|exponential|multinomial|_?unique|glu)\w*
    | (lift|hard|softplus|softshrink|threshold|nonzero|upsample)\w* | arange | linspace | eye | full | ones
    | scalar_tensor | cat | _?stack
    | clone | contiguous | copy | _to_copy | alias | set | roll | flip | rot90 | block_diag | where | im2col | col2im
    | constant | complex | real | imag | polar | _conj_physical | sort | topk | kthvalue | argsort | searchsorted
    | bucketize | bincount | cummax | cummin | mode | trace | dist | _aminmax | isin | equal | item
    | _efficientzerotensor | _linalg_check_errors | floor_divide
    | a?(max|min|minmax) | arg(max|min) | (nan)?sum | mean | prod | all | any | count_nonzero | logsumexp""",
    re.VERBOSE,
)
"""Names of aten operators without a pointwise tag that do a few operations per element at most."""


@dataclass(frozen=True)
class FlopReport:
    """Work of one call, for the whole batch it was given.

    forward, forward_backward: FLOPs counted, of every kind; matmul: the part of `forward` that is matrix products,
    convolutions, attention and recurrent layers; products: `matmul` and our own operators of that kind (PRODUCTS);
    operators: operator -> FLOPs, `forward` split up; algorithmic: `forward` without the scores that a causal flag
    discards; tree: dotted module -> FLOPs of its forward. uncounted: operator -> elements touched, forward and
    backward; elementwise: elements touched by light operators. device: "meta" where shapes alone were run, else the
    device of the module, whose control flow reads values.
    """

    forward: float
    matmul: float
    products: float
    forward_backward: float
    operators: Mapping[str, float]
    uncounted: Mapping[str, int]
    elementwise: int
    device: str
    algorithmic: float
    tree: Mapping[str, float]

    @property
    def kernels(self) -> float:
        """Work of our own operators that are no matrix products: scans, long convolutions, kernels of state spaces."""
        own = sum(work for op, work in self.operators.items() if op.startswith("lra."))
        return own - (self.products - self.matmul)

    def declared(self, cost: Cost) -> float:
        """What `cost` declares of the work in `products` and `kernels`. `Cost.other` holds elementwise work beside that
        of the kernels, so that no more of it counts than they did; less means that the kernels are missing there."""
        return cost.matmul + min(cost.other, self.kernels)


def count(module: nn.Module, *inputs: Any, device: str = "meta", backward: bool = True) -> FlopReport:
    """Run `module(*inputs)` and the gradient of its outputs' sum under the counter. `inputs` may be nested tensors.
    Without `backward`, forward_backward is forward.

    The run happens on a copy and on the meta device, so it takes no memory; a module that looks at values, which
    meta tensors lack, is run where it is (`device=""` asks for that at once).
    """
    if device == "meta":
        # a module that reads values may raise anything on meta; a real fault recurs below
        with suppress(Exception):
            return _run(module, inputs, "meta", backward)
    return _run(module, inputs, "", backward)


def encoder_flops(encoder: Encoder, batch: int, length: int, device: str = "meta", backward: bool = True) -> FlopReport:
    """`count` for `batch` full sequences of `length` tokens through an encoder, gradient for its input included."""
    like = next(encoder.parameters())
    x = torch.zeros(batch, length, encoder.d_model, device=like.device, dtype=like.dtype, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.bool, device=like.device)
    return count(encoder, x, mask, device=device, backward=backward)


def model_flops(model: nn.Module, batch: Any) -> FlopReport:
    """`count` for one batch of a classifier."""
    return count(model, batch)


def _run(module: nn.Module, inputs: tuple[Any, ...], device: str, backward: bool) -> FlopReport:
    def move(t: Tensor) -> Tensor:
        return t.detach().to(device or t.device, copy=True).requires_grad_(t.requires_grad)

    twin, given = _copied(module, move), tree_map_only(Tensor, move, inputs)
    for part in twin.modules():
        if isinstance(part, nn.RNNBase):
            part.forward = partial(_in_bulk, part, part.forward)
    census, discarded, path = _Census(), _Discarded(), _Path(twin)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator that nothing counts
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), census, _counter(path) as counter:
            with discarded:
                outputs = [t for t in tree_leaves(twin(*given)) if isinstance(t, Tensor) and t.requires_grad]
            counts, own_products = counter.get_flop_counts(), census.products
            names = [name for name in ("Global", *path.names.values()) if name in counts]
            tree = {name: float(sum(counts[name].values())) for name in names}
            forward = dict(counts.get("Global", {}))
            if outputs and backward:
                torch.stack([t.sum() for t in outputs]).sum().backward()
            total = counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    where = device or str(next((t.device for t in (*twin.parameters(), *tree_leaves(given))), "cpu"))
    matmul = float(sum(work for op, work in forward.items() if op in MATMUL))
    return FlopReport(
        forward=float(sum(forward.values())),
        matmul=matmul,
        products=matmul + own_products,
        forward_backward=float(total),
        operators={str(op): float(work) for op, work in forward.items()},
        uncounted=dict(census.uncounted),
        elementwise=census.light,
        device=where,
        algorithmic=float(sum(forward.values())) - discarded.work,
        tree=tree,
    )


def _copied(module: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose tensors are moved copies: registered ones, and those a layer merely remembers."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for t in tree_leaves(list(vars(part).values())):
            if isinstance(t, nn.Parameter):
                memo[id(t)] = nn.Parameter(move(t).detach(), requires_grad=t.requires_grad)
            elif isinstance(t, Tensor):
                memo[id(t)] = move(t)
    return copy.deepcopy(module, memo)


def _in_bulk(rnn: nn.RNNBase, forward: Callable[..., Any], x: Any, state: Any = None) -> Any:
    """Stands in for a recurrent layer: the same matrix products, all time steps at once. Step by step, on the meta
    device and under a counter, 2,048 tokens took minutes. Shapes are right, values are not."""
    if not isinstance(x, Tensor) or x.dim() != 3:
        return forward(x, state)
    y, ways, kinds = x, 2 if rnn.bidirectional else 1, ("ih", "hh", *(["hr"] if rnn.proj_size else []))
    for layer in range(rnn.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[:ways]:
            weight = {kind: rnn.get_parameter(f"weight_{kind}_l{layer}{suffix}") for kind in kinds}
            gates = F.linear(y, weight["ih"])
            h = gates[..., : rnn.hidden_size]
            h = F.linear(h, weight["hr"]) if "hr" in weight else h
            gates = gates + F.linear(h, weight["hh"])
            outputs.append(h + gates[..., : h.shape[-1]])
        y = torch.cat(outputs, dim=-1)
    batch = x.shape[0 if rnn.batch_first else 1]
    last = [x.new_zeros(rnn.num_layers * ways, batch, n) for n in (rnn.proj_size or rnn.hidden_size, rnn.hidden_size)]
    return y, tuple(last) if rnn.mode == "LSTM" else last[0]


class _Discarded(TorchFunctionMode):
    """Adds up the work of scores and weighted sums that attention does for pairs its causal flag then hides."""

    work = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (kwargs.get("is_causal") or (len(args) > 5 and args[5])):
            q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
            rows, columns = q.shape[-2], k.shape[-2]
            kept = sum(min(i + 1, columns) for i in range(rows))
            self.work += 2.0 * q.shape[:-2].numel() * (rows * columns - kept) * (q.shape[-1] + v.shape[-1])
        return func(*args, **kwargs)


class _Census(TorchDispatchMode):
    """Notices every operator that runs below the counter and has no formula, and our own matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.uncounted: Counter[str] = Counter()
        self.light, self.products = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if str(packet) in PRODUCTS and PRODUCTS[str(packet)](*args):
            self.products += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        if packet in flop_registry or packet in FORMULAS or func.is_view:
            return out
        size = max((t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)), default=0)
        if _is_light(func):
            self.light += size
        elif size:
            self.uncounted[str(packet)] += size
        return out


@cache
def _is_light(func: Any) -> bool:
    space, name = func.name().split(".")[0].split("::")
    # torch tags the plain form of an operator, and not always the one in place
    plain = getattr(getattr(torch.ops, space), name.removesuffix("_"), func._overloadpacket)
    tags = {tag for form in (func, getattr(plain, func._overloadname, func)) for tag in form.tags}
    if {torch.Tag.pointwise, torch.Tag.inplace_view} & tags:
        return True
    return space == "prim" or (space == "aten" and LIGHT.fullmatch(name.rstrip("_")) is not None)


class _Path:
    """Where in the module tree the forward is. FlopCounterMode's own tracker also hooks every gradient, which a
    reversible layer, whose backward takes gradients itself, does not survive."""

    def __init__(self, root: nn.Module) -> None:
        top = type(root).__name__
        self.names = {id(part): f"{top}.{name}".rstrip(".") for name, part in root.named_modules()}
        self.stack: list[str] = []

    @property
    def parents(self) -> set[str]:
        return {"Global", *self.stack}

    def _enter(self, module: nn.Module, _: Any) -> None:
        if id(module) in self.names:
            self.stack.append(self.names[id(module)])

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in self.names:
            self.stack.pop()

    def __enter__(self) -> None:
        before = nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        self.hooks = (before, after)

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _counter(path: _Path) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = path  # type: ignore[assignment]
    # its own registry is a copy, and kernels register their formulas when they first run
    own = {op: counter.flop_registry[op] for op in FORMULAS}
    counter.flop_registry = ChainMap(own, flop_registry)  # type: ignore[assignment]
    return counter
