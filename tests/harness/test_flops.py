"""What the FLOP counter sees, against formulas and against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log2, prod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from lra.profiling.flops import count, encoder_flops, model_flops
from lra.registry import architectures

B, L, D, H = 2, 64, 32, 4
EVERYWHERE = pytest.mark.parametrize("device", ["meta", ""])


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*self.parts, *inputs)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (B, L, D)), dtype=dtype, requires_grad=True)


@EVERYWHERE
def test_linear(device: str) -> None:
    report = count(nn.Linear(D, 3 * D), x(), device=device)
    assert report.forward == report.matmul == 2 * B * L * D * 3 * D
    assert report.forward_backward == 3 * report.forward
    assert report.uncounted == {}
    assert report.device == (device or "cpu")


def test_without_an_input_gradient_one_product_less() -> None:
    report = count(nn.Linear(D, D), x().detach())
    assert report.forward_backward == 2 * report.forward
    assert count(nn.Linear(D, D), x(), backward=False).forward_backward == report.forward


@EVERYWHERE
@pytest.mark.parametrize("causal", [False, True])
def test_attention(device: str, causal: bool) -> None:
    attention = Call(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=causal))
    report = count(attention, x(B, H, L, D), device=device)
    assert report.forward == report.matmul == 4 * B * H * L * L * D
    assert report.forward_backward == 3 * report.forward
    assert report.uncounted == {}


@EVERYWHERE
def test_fused_attention_modules_are_not_missed(device: str) -> None:
    """In evaluation mode PyTorch runs these as one operator that its counter does not know."""
    projections, scores = 2 * B * L * D * 4 * D, 4 * B * L * L * D
    attention = Call(lambda m, v: m(v, v, v)[0], nn.MultiheadAttention(D, H, batch_first=True)).eval()
    assert count(attention, x(), device=device).forward == projections + scores
    layer = nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True).eval().requires_grad_(False)
    assert count(layer, x().detach(), device=device).forward == projections + scores + 2 * B * L * 8 * D * D
    assert torch.backends.mha.get_fastpath_enabled()


@EVERYWHERE
@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers(device: str, kind: type[nn.RNN | nn.GRU | nn.LSTM], gates: int) -> None:
    report = count(kind(D, D, batch_first=True), x(), device=device)
    assert report.matmul == report.forward == 2 * B * L * gates * 2 * D * D
    assert report.forward_backward == 3 * report.forward
    assert report.uncounted == {}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        (nn.LSTM, {"proj_size": 8, "num_layers": 2}),
        (nn.RNN, {"bias": False}),
    ],
)
def test_recurrent_layers_counted_in_bulk_as_step_by_step(
    kind: type[nn.RNN | nn.GRU | nn.LSTM], options: dict[str, Any]
) -> None:
    """PyTorch's own counter on the meta device walks through the time steps."""
    with FlopCounterMode(display=False) as steps:
        wanted = kind(D, 24, device="meta", **options)(torch.empty(7, 5, D, device="meta"))
    found: list[Any] = []

    def run(rnn: nn.Module, v: Tensor) -> Tensor:
        found[:] = tree_leaves(rnn(v))
        return found[0]

    assert count(Call(run, kind(D, 24, **options)), x(7, 5, D)).forward == steps.get_total_flops() > 0
    assert [t.shape for t in found] == [t.shape for t in tree_leaves(wanted)]


@EVERYWHERE
@pytest.mark.parametrize("groups", [1, D])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_convolutions(device: str, groups: int, kind: type[nn.Conv1d | nn.ConvTranspose1d]) -> None:
    report = count(kind(D, D, 3, padding=1, groups=groups), x(B, D, L), device=device)
    assert report.forward == 2 * B * L * 3 * D * D / groups
    assert report.forward_backward == 3 * report.forward


@EVERYWHERE
def test_complex_products_count_four_times(device: str) -> None:
    product = Call(lambda a, b: torch.einsum("bld,de->ble", a, b).real)
    report = count(product, x(B, L, D, dtype=torch.complex64), x(D, D, dtype=torch.complex64), device=device)
    assert report.forward == 8 * B * L * D * D
    assert report.forward_backward == 3 * report.forward
    assert count(Call(torch.mv), x(L, D), x(D), device=device).forward == 2 * L * D


@EVERYWHERE
def test_transforms_and_sums(device: str) -> None:
    there = Call(lambda v: torch.fft.irfft(torch.fft.rfft(v, n=2 * L, dim=1), n=2 * L, dim=1))
    report = count(there, x(), device=device)
    assert report.forward == pytest.approx(2 * 2.5 * B * D * 2 * L * log2(2 * L))
    assert report.matmul == 0
    assert report.uncounted == {}
    whole = Call(lambda v: torch.fft.fft(torch.view_as_complex(v), dim=1).real)
    assert count(whole, x(B, L, D, 2), device=device).forward == pytest.approx(5 * B * D * L * log2(L))
    plane = Call(lambda v: torch.fft.fft2(torch.view_as_complex(v)).real)
    assert count(plane, x(B, L, D, 2), device=device).forward == pytest.approx(5 * B * D * L * log2(L * D))
    assert count(Call(lambda v: v.cumsum(1)), x(), device=device).forward == B * L * D
    solve = Call(lambda a, b: torch.linalg.solve_triangular(a, b, upper=False))
    assert count(solve, x(B, L, L), x(), device=device).forward == B * L * L * D
    general = count(Call(torch.linalg.solve), x(B, L, L), x(), device=device)
    assert general.forward == pytest.approx(B * (2 / 3 * L**3 + 2 * L * L * D))
    assert general.uncounted == {}


def test_operators_without_a_formula_are_listed() -> None:
    report = count(Call(torch.linalg.svdvals), x(B, D, D))
    assert report.forward == 0
    assert report.uncounted["aten._linalg_svd"] >= B * D


def test_custom_operators() -> None:
    @torch.library.custom_op("lra_test::unknown", mutates_args=())
    def unknown(v: Tensor) -> Tensor:
        return v @ v.mT

    @unknown.register_fake
    def _(v: Tensor) -> Tensor:
        return v @ v.mT

    inputs = x(B, D, D).detach()
    report = count(Call(lambda v: unknown(v)), inputs)
    assert report.forward == 0
    assert report.uncounted == {"lra_test.unknown": B * D * D}

    def late(v: Tensor) -> Tensor:
        # as a kernel does whose module is imported by its first call
        if torch.ops.lra_test.unknown not in flop_registry:
            register_flop_formula(torch.ops.lra_test.unknown)(lambda shape, **_: 2 * D * prod(shape))
        return unknown(v)

    report = count(Call(late), inputs)
    assert report.operators == {"lra_test.unknown": 2 * B * D**3}
    assert (report.matmul, report.uncounted) == (0, {})


def test_light_work_is_not_called_uncounted() -> None:
    def light(v: Tensor) -> Tensor:
        v = F.layer_norm(v, (D,)).softmax(-1) + F.rms_norm(v, (D,)).relu()
        v = F.pad(v, (0, 0, 1, 0))[:, :-1].masked_fill(v > 0, 0).flip(1).roll(1, 1)
        v = torch.cat([v, v.gather(1, v.argsort(1)), v.amax(1, keepdim=True)], 1).topk(L, 1).values
        v = v.square().abs_().log_()  # in place, where torch does not always say what an operator is
        return F.dropout(v, 0.1) * torch.where(v > 0, v, -v).logsumexp(-1, keepdim=True)

    report = count(Call(light), x())
    assert report.uncounted == {}
    assert report.elementwise > 10 * B * L * D


class Remembers(nn.Module):
    """Looks at values, which meta tensors lack, and keeps a tensor that has a history."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, v: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.inner(v)
        return F.dropout(self.last, 0.5) if v.abs().sum() > 0 else v


def test_a_module_that_reads_values_is_run_where_it_is_and_left_alone() -> None:
    module = Remembers()
    inputs = x()
    module(inputs)
    before = torch.get_rng_state()
    report = count(module, inputs)
    assert report.device == "cpu"
    assert report.forward == 2 * B * L * D * D
    assert module.calls == 1
    assert module.inner.weight.grad is None
    assert inputs.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fault_of_the_module_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        count(nn.Linear(D + 1, D), x())


class Pair(NamedTuple):
    values: Tensor
    mask: Tensor


def test_encoder_and_model() -> None:
    encoder = architectures.get("transformer")(d_model=D, n_layers=2, length=L)
    report = encoder_flops(encoder, B, L)
    assert report.device == "meta"
    assert report.matmul == B * encoder.cost(L).matmul
    assert report.forward_backward == 3 * report.forward
    model = Call(lambda table, inner, batch: inner(table(batch.values), batch.mask), nn.Embedding(9, D), encoder)
    whole = model_flops(model, Pair(torch.zeros(B, L, dtype=torch.uint8).int(), torch.ones(B, L, dtype=torch.bool)))
    assert whole.forward_backward == report.forward_backward


@EVERYWHERE
def test_what_a_causal_flag_hides_is_left_out_of_the_algorithmic_count(device: str) -> None:
    attention = Call(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    report = count(attention, x(B, H, L, D), device=device)
    assert report.algorithmic == 4 * B * H * D * L * (L + 1) / 2
    whole = count(Call(lambda q: F.scaled_dot_product_attention(q, q, q)), x(B, H, L, D), device=device)
    assert whole.algorithmic == whole.forward == report.forward


def test_the_tree_adds_up() -> None:
    model = nn.Sequential(nn.Linear(D, 2 * D), nn.Sequential(nn.Linear(2 * D, D), nn.Linear(D, D)))
    tree = count(model, x()).tree
    one = 2 * B * L * D * D
    assert (tree["Sequential.0"], tree["Sequential.1.0"], tree["Sequential.1.1"]) == (2 * one, 2 * one, one)
    assert tree["Sequential.1"] == 3 * one
    assert tree["Global"] == 5 * one
    inner = ["Sequential.0", "Sequential.1", "Sequential.1.0", "Sequential.1.1"]
    assert list(tree) == ["Global", "Sequential", *inner]


def test_our_own_products_count_as_products_and_scans_as_kernels() -> None:
    encoder = architectures.get("gru")(d_model=16, n_layers=2, length=L)
    report = encoder_flops(encoder, 1, L)
    assert report.products == report.matmul + report.operators["lra.recurrent_cell"] == encoder.cost(L).matmul
    assert report.kernels == 0
    for name, operator in (("mamba", "lra.selective_scan"), ("indrnn", "lra.recurrent_cell")):
        report = encoder_flops(architectures.get(name)(d_model=16, n_layers=1, length=L), 1, L)
        assert report.products == report.matmul
        assert report.operators[operator] <= report.kernels <= report.forward - report.matmul


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("gru", "matmul"), ("longformer", "matmul"), ("moe", "matmul"), ("delta_elman", "matmul"), ("mamba", "other"),
     ("deltanet", "other"), ("s4d", "other"), ("retnet", "other")],
)  # fmt: skip
def test_a_cost_without_the_work_of_its_kernel_disagrees(name: str, dropped: str) -> None:
    """Also where what is left is the work of the other operators: each belongs to one part of the cost."""
    encoder = architectures.get(name)(d_model=32, n_layers=1, length=130)
    report, cost = encoder_flops(encoder, 1, 130, backward=False), encoder.cost(130).of_batch(1)
    assert report.declared(cost) == pytest.approx(report.products + report.kernels, rel=0.01)
    of_kernel = report.products - report.matmul if dropped == "matmul" else report.kernels
    broken = replace(cost, **{dropped: getattr(cost, dropped) - of_kernel})
    assert report.declared(broken) < 0.99 * (report.products + report.kernels)


UNCOUNTED: dict[str, set[str]] = {}
"""architecture -> operators whose work is unknown, each with its reason beside it."""


@pytest.mark.parametrize("name", architectures.names())
def test_formula_and_counter_agree_at_an_odd_length_and_everything_is_counted(name: str) -> None:
    """A longer sequence than the conformance checks take, on the meta device; the gradient's operators too."""
    encoder = architectures.get(name)(d_model=32, n_layers=1, length=150)
    report, declared = encoder_flops(encoder, 1, 130, backward=True), encoder.cost(130).of_batch(1)
    assert report.products == pytest.approx(declared.matmul, rel=0.01)
    assert report.declared(declared) == pytest.approx(report.products + report.kernels, rel=0.01)
    assert 0 < report.algorithmic <= report.forward
    assert set(report.uncounted) == UNCOUNTED.get(name, set())
