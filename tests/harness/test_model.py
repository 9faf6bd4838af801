"""The classifier around an encoder, and the optimiser's groups."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import lra
from lra.config import match
from lra.config.recipe import Data, Optim, Recipe
from lra.encoder import Cost, Encoder
from lra.errors import UserError
from lra.model import Batch, Classifier, Head
from lra.profiling import flops
from lra.registry import architectures
from lra.task import Protocol
from lra.training import optimisers
from lra.training.run_record import model_work

TOKENS = Protocol("tokens", length=8, vocabulary=11)
HIDING = Protocol("hiding", length=8, vocabulary=11, hides_zeros=True)
PIXELS = Protocol("pixels", length=8, channels=3, scale=(0.5, 0.25))


class Identity(Encoder):
    """Returns its input, and garbage at padding."""

    gaps, direction = True, "bidirectional"

    def __init__(self, d_model: int = 6, optim: Mapping[str, Mapping[str, float]] | None = None) -> None:
        super().__init__()
        self.d_model, self.n_layers, self.length = d_model, 1, 8
        self.log_dt, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2, 2))
        self._optim = optim or {}

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return self._optim

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(~mask.unsqueeze(-1), 1e9)

    def cost(self, length: int) -> Cost:
        return Cost(matmul=10.0 * length)


def batch(towers: int = 1, channels: int = 0) -> Batch:
    shape = (3, towers, 5)
    values = torch.randint(0, 11, (*shape, channels) if channels else shape, dtype=torch.uint8)
    mask = torch.arange(5) < torch.tensor([5, 2, 1]).view(3, 1, 1)
    return Batch(values, mask.expand(shape), torch.zeros(3, dtype=torch.int64), torch.arange(3))


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "cls", "first"])
def test_pooling_looks_at_real_tokens_only(pooling: str) -> None:
    torch.manual_seed(0)
    model, given = Classifier(Identity(), TOKENS, 4, 1, pooling), batch()
    x, mask = model.encode(given.values.flatten(0, 1), given.mask.flatten(0, 1))
    pooled = model.pool(x, mask)
    assert pooled.abs().max() < 100, "padding was pooled"
    assert isinstance(model.embedding, nn.Embedding)
    table = model.embedding.weight
    row = [table[int(v)] for v in given.values[1, 0, :2]]
    mean, largest = (row[0] + row[1]) / 2, torch.maximum(*row)
    expected = {"mean": mean, "max": largest, "last": row[1], "cls": model.cls, "first": row[0]}[pooling]
    torch.testing.assert_close(pooled[1], expected)


def test_two_towers_share_weights_and_meet_in_four_parts() -> None:
    torch.manual_seed(0)
    model, given = Classifier(Identity(), TOKENS, 2, 2, "mean"), batch(towers=2)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model(given).shape == (3, 2)
    u, v = (model.pool(*model.encode(given.values[:, t], given.mask[:, t])) for t in (0, 1))
    torch.testing.assert_close(seen[0], torch.cat([u, v, u * v, u - v], -1))


@pytest.mark.parametrize(
    ("head", "towers", "widths", "features"),
    [
        (Head(), 1, [(6, 3)], 6),
        (Head(), 2, [(24, 6), (6, 3)], 24),
        (Head("mlp", (10,), "relu"), 1, [(6, 10), (10, 3)], 6),
        # LRA: classifier_head_dual of common_layers.py
        (Head("mlp", (10, 5), "relu", "concat"), 2, [(12, 10), (10, 5), (5, 3)], 12),
        (Head("linear"), 2, [(24, 3)], 24),
    ],
)
def test_heads_have_the_layers_they_name(head: Head, towers: int, widths: list[tuple[int, int]], features: int) -> None:
    torch.manual_seed(0)
    model, given = Classifier(Identity(), TOKENS, 3, towers, "mean", head), batch(towers)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model(given).shape == (3, 3)
    assert seen[0].shape == (3, features)
    linear = [m for m in model.head.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == widths
    h = seen[0]
    for layer in linear[:-1]:
        h = nn.functional.relu(layer(h)) if head.activation == "relu" else nn.functional.gelu(layer(h))
    torch.testing.assert_close(model(given), linear[-1](h))


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "cls", "first"])
def test_a_protocol_that_hides_zeros_hides_them_like_padding(pooling: str) -> None:
    """But not the first token: a mask without a token would leave nothing to read."""
    torch.manual_seed(0)
    model = Classifier(Identity(), HIDING, 2, 1, pooling)
    values = torch.tensor([[0, 3, 0, 4, 0]])
    x, mask = model.encode(values, torch.ones(1, 5, dtype=torch.bool))
    assert mask[0, -5:].tolist() == [True, True, False, True, False]
    shown, real = model.encode(values[:, [0, 1, 3]], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(model.pool(x, mask), model.pool(shown, torch.ones_like(real)))


@pytest.mark.parametrize(
    "name",
    [
        "transformer",
        "transformer/t5",
        "transformer/shaw",
        "local",
        "local/overlap",
        "sparse",
        "longformer",
        "synthesizer",
    ],
)
def test_encoders_that_take_masks_with_gaps_never_look_at_what_is_hidden(name: str) -> None:
    """Asked of the mixer: the block around it sets hidden tokens to zero, which a softmax would still see."""
    torch.manual_seed(0)
    own = {"size": 4} if name.startswith("local") else {}
    encoder = architectures.get(name)(d_model=8, n_layers=1, length=16, direction="bidirectional", **own).eval()
    mixer = encoder.layers[0].mixer
    x, mask = torch.randn(2, 16, 8), torch.rand(2, 16) < 0.5
    mask[:, 0] = True
    changed = torch.where(mask.unsqueeze(-1), x, torch.randn(2, 16, 8))
    with torch.no_grad():
        y, again, all_shown = (mixer(*given) for given in ((x, mask), (changed, mask), (x, torch.ones_like(mask))))
    torch.testing.assert_close(y[mask], again[mask])
    assert not torch.allclose(y[mask], all_shown[mask], atol=1e-3)


def test_hidden_tokens_are_as_if_they_were_not_there() -> None:
    torch.manual_seed(0)
    encoder = architectures.get("transformer")(
        d_model=8, n_layers=2, length=16, direction="bidirectional", positions="none"
    )
    x, mask = torch.randn(1, 16, 8), (torch.arange(16) % 3 != 1).unsqueeze(0)
    short = x[mask].unsqueeze(0)
    torch.testing.assert_close(encoder(x, mask)[mask], encoder(short, torch.ones(short.shape[:2], dtype=torch.bool))[0])


@pytest.mark.parametrize(
    ("name", "direction"), [("s4d", "bidirectional"), ("bigbird", "bidirectional"), ("transformer", "causal")]
)
def test_an_encoder_without_gaps_is_refused_where_the_protocol_needs_them(name: str, direction: str) -> None:
    encoder = architectures.get(name)(d_model=8, n_layers=1, length=16, direction=direction)
    with pytest.raises(UserError, match=r"protocol hiding hides tokens between others, which .* does not support"):
        Classifier(encoder, HIDING, 2, 1, "mean")


def test_continuous_input_is_scaled_as_the_protocol_says() -> None:
    model, given = Classifier(Identity(), PIXELS, 2, 1, "mean"), batch(channels=3)
    x, _ = model.encode(given.values.flatten(0, 1), given.mask.flatten(0, 1))
    assert isinstance(model.embedding, nn.Linear)
    expected = model.embedding((given.values[0, 0, 0].float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(x[0, 0], expected)


def test_token_zero_is_a_token_like_any_other() -> None:
    model = Classifier(Identity(), TOKENS, 2, 1, "mean")
    values, mask = torch.zeros(1, 1, 4, dtype=torch.uint8), torch.ones(1, 1, 4, dtype=torch.bool)
    model(Batch(values, mask, torch.zeros(1).long(), torch.zeros(1).long())).sum().backward()
    assert isinstance(model.embedding, nn.Embedding)
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad[0].abs().sum() > 0


def test_cost_counts_both_towers_and_the_cls_token() -> None:
    one = Classifier(Identity(), TOKENS, 2, 1, "mean").cost(8).matmul
    assert one == 80 + 2 * 6 * 2
    assert Classifier(Identity(), TOKENS, 2, 1, "cls").cost(8).matmul == one + 10
    assert Classifier(Identity(), TOKENS, 2, 2, "mean").cost(8).matmul == 160 + 2 * (24 * 6 + 6 * 2)


def test_work_of_a_batch_is_charged_once() -> None:
    kernel, token = Cost(30.0, 6.0).per_batch, Cost(4.0, 1.0)
    both = kernel + 3 * token
    assert (both.matmul, both.other, both.batch_matmul, both.batch_other) == (12, 3, 30, 6)
    assert both.total == 51
    assert both.of_batch(4) == Cost(78, 18)
    assert 2 * both == Cost(24, 6, 60, 12)

    class WithKernel(Identity):
        def cost(self, length: int) -> Cost:
            return both

    # two towers are two sequences of one batch
    head = 2 * (24 * 6 + 6 * 2)
    found = Classifier(WithKernel(), TOKENS, 2, 2, "mean").cost(8)
    assert (found.matmul, found.batch_matmul) == (24 + head, 30)


@pytest.mark.parametrize("towers", [1, 2])
def test_a_record_and_a_budget_charge_an_example_its_share_of_the_batch(towers: int) -> None:
    encoder = architectures.get("linear_ssm")(d_model=6, n_layers=1, length=8)
    model = Classifier(encoder, TOKENS, 2, towers, "mean")
    work = model_work(model, TOKENS, 4)
    shape = (4, towers, 8)
    zeros = torch.zeros(shape, dtype=torch.uint8), torch.ones(shape, dtype=torch.bool), *torch.zeros(2, 4).long()
    counted = flops.model_flops(model, Batch(*zeros))
    for key in ("forward", "matmul", "forward_backward"):
        assert getattr(work, key) == pytest.approx(getattr(counted, key) / 4, rel=1e-6)
    assert work.matmul_by_formula == pytest.approx(work.matmul, rel=0.01)
    assert work.convention.endswith("one example of a batch of 4")
    recipe = Recipe("r", "listops", "linear_ssm", data=Data(batch_size=4))
    assert match._cost("flops", model, recipe, TOKENS) == 3 * model.cost(8).of_batch(4).total / 4


def groups(patterns: Mapping[str, Mapping[str, float]], lr: float = 0.01) -> dict[int, tuple[float, float]]:
    encoder = Identity(optim=patterns)
    model = Classifier(encoder, TOKENS, 2, 1, "mean")
    found = optimisers.parameter_groups(model, encoder, Optim(lr=lr, weight_decay=0.1))
    assert sorted(id(p) for g in found for p in g["params"]) == sorted(id(p) for p in model.parameters())
    by = {id(p): (g["lr"], g["weight_decay"]) for g in found for p in g["params"]}
    return {0: by[id(encoder.log_dt)], 1: by[id(encoder.scale)], 2: by[id(model.head.bias)]}


def test_groups_follow_the_encoder_and_decay_matrices_only() -> None:
    assert groups({}) == {0: (0.01, 0.0), 1: (0.01, 0.1), 2: (0.01, 0.0)}
    own = {"log_*": {"lr": 1e-3, "weight_decay": 0.0}, "*": {"lr_scale": 0.5}}
    assert groups(own) == {0: (1e-3, 0.0), 1: (0.005, 0.1), 2: (0.01, 0.0)}
    assert groups({"log_dt": {"lr": 1e-3}}, lr=1e-4)[0] == (1e-4, 0.0), "lr is a ceiling"


def test_a_pattern_that_matches_nothing_or_a_wrong_key_is_refused() -> None:
    with pytest.raises(UserError, match="matches no parameter"):
        groups({"log_dtt": {"lr": 1.0}})
    with pytest.raises(UserError, match="'rate'"):
        groups({"log_dt": {"rate": 1.0}})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "rsqrt"])
def test_schedules_warm_up_peak_and_end(schedule: str) -> None:
    at = optimisers.factor(Optim(schedule=schedule, warmup=10), steps=110)
    assert [at(0), at(4), at(9)] == [0.1, 0.5, 1.0]
    assert at(10) == 1.0
    end = {"constant": 1.0, "linear": 0.0, "cosine": 0.0, "rsqrt": (10 / 110) ** 0.5}[schedule]
    assert at(110) == pytest.approx(end)
    assert all(at(s + 1) <= at(s) for s in range(10, 110))


@pytest.mark.parametrize("architecture", ["s4d", "bounded_cnn", "hgrn"])
def test_gradients_under_bfloat16_autocast_are_those_of_float32(architecture: str) -> None:
    """Over 8,192 tokens: sums in bfloat16 lose what fewer tokens would not show."""
    torch.manual_seed(0)
    length, classes, count = 256, 10, 32
    protocol = Protocol("pixels", length=length, channels=1, scale=(0.5, 0.25))
    encoder = lra.create_encoder(architecture, d_model=16, n_layers=1, length=length)
    model = Classifier(encoder, protocol, classes, 1, "mean")
    values = torch.randint(0, 256, (count, 1, length, 1), dtype=torch.uint8)
    mask = torch.ones(count, 1, length, dtype=torch.bool)
    labels = torch.arange(count) % classes
    given = Batch(values, mask, labels, torch.arange(count))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(given).float()
        loss = nn.functional.cross_entropy(logits, labels)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), exact, rounded in zip(model.named_parameters(), *gradients, strict=True):
        assert (rounded - exact).norm() <= 0.05 * exact.norm(), name
