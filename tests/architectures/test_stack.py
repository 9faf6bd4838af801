"""The shared residual stack: blocks as their equations say, both directions, recurrent mode, cost."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from stepping import stepped
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._experts import Experts
from lra.architectures._moe import MIXTURES
from lra.architectures._stack import Bidirectional, Block, FeedForward, Layer, Stack, flip, sinusoidal
from lra.encoder import Card, Cost, Mixer
from lra.profiling.flops import encoder_flops

B, L, D = 3, 9, 8
MASK = torch.arange(L) < torch.tensor([[9], [5], [1]])


class Sum(Mixer):
    """y_t = W (x_1 + ... + x_t): one product, a state, and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D, bias=False)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.seen = x
        return self.out(x.cumsum(1))

    def cost(self, length: int) -> Cost:
        return Cost.linear(length, D, D, bias=False)

    def init_state(self, batch: int) -> Tensor:
        return self.out.weight.new_zeros(batch, D)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(state + x), state + x

    def aux_loss(self) -> Tensor | None:
        return self.out.weight.square().sum()


class Sums(Stack):
    card = Card(title="t", year=2000, url="u", scaling="L", causal=True)

    def __init__(self, direction: str = "causal", native: bool = False, dropout: float = 0.0, **block: Any) -> None:
        super().__init__(
            lambda _: Sum(), d_model=D, n_layers=2, length=L, dropout=dropout, direction=direction, native=native,
            block=block,
        )  # fmt: skip


def sums(encoder: Sums) -> list[Sum]:
    return [m for m in encoder.modules() if isinstance(m, Sum)]


def inputs() -> Tensor:
    return torch.randn(B, L, D, dtype=torch.float64)


def test_prenorm_and_postnorm() -> None:
    """x + part(norm(x)) against norm(x + part(x)), mixer first, feed-forward after."""
    x = inputs()
    for prenorm in (True, False):
        block = Layer(Sum(), D, Block(prenorm=prenorm, norm="rms"), 0.0).double()
        mixer, ffn, one, two = block.mixer, block.ffn, block.norm, block.ffn_norm
        assert ffn is not None
        assert two is not None
        real = MASK.unsqueeze(-1)
        if prenorm:
            h = x + mixer(one(x) * real, MASK)
            expected = h + ffn(two(h))
        else:
            h = one(x + mixer(x * real, MASK))
            expected = two(h + ffn(h))
        torch.testing.assert_close(block(x, MASK), expected)


def test_the_last_norm_belongs_to_prenorm() -> None:
    x = inputs()
    plain, post = Sums().double(), Sums(prenorm=False).double()
    h = x.masked_fill(~MASK.unsqueeze(-1), 0)
    for layer in plain.layers:
        h = layer(h, MASK)
    torch.testing.assert_close(plain(x, MASK), F.layer_norm(h, (D,)))
    assert isinstance(post.norm, nn.Identity)


def test_feed_forward() -> None:
    x = inputs()
    for kind, act in (("gelu", F.gelu), ("relu", F.relu)):
        ffn = FeedForward(kind, D, 3.0, 0.0).double()
        torch.testing.assert_close(ffn(x), ffn.down(act(ffn.up(x))))
    ffn = FeedForward("swiglu", D, 2.5, 0.0).double()
    w1, w3 = ffn.up.weight.chunk(2)
    b1, b3 = ffn.up.bias.chunk(2)
    torch.testing.assert_close(ffn(x), ffn.down(F.silu(x @ w1.T + b1) * (x @ w3.T + b3)))
    assert ffn.hidden == 20
    assert Sums(ffn="none").layers[0].ffn is None


def test_the_mixer_sees_zeros_at_the_padding() -> None:
    encoder = Sums(norm="layer").double()
    encoder(inputs(), MASK)
    for mixer in sums(encoder):
        assert mixer.seen is not None
        assert (mixer.seen[~MASK] == 0).all()
        assert (mixer.seen[MASK] != 0).any()


def test_flip_reverses_the_real_tokens() -> None:
    x = inputs()
    turned = flip(x, MASK)
    for row, length in enumerate((9, 5, 1)):
        assert torch.equal(turned[row, :length], x[row, :length].flip(0))
        assert torch.equal(turned[row, length:], x[row, length:])
    assert torch.equal(flip(turned, MASK), x)


@pytest.mark.parametrize("combine", ["concat", "add", "shared"])
def test_both_ways(combine: str) -> None:
    """Row by row and without padding: what lies ahead is the mixer on the reversed sequence, reversed."""
    mixer = Bidirectional(Sum, D, combine).double()
    x = inputs() * MASK.unsqueeze(-1)
    found = mixer(x, MASK)
    assert (mixer.back is None) == (combine == "shared")
    back = mixer.back or mixer.ahead
    for row, length in enumerate((9, 5, 1)):
        alone = x[row : row + 1, :length]
        whole = torch.ones(1, length, dtype=torch.bool)
        there, again = mixer.ahead(alone, whole), back(alone.flip(1), whole).flip(1)
        joined = there + again if mixer.project is None else mixer.project(torch.cat([there, again], dim=-1))
        torch.testing.assert_close(found[row, :length], joined[0])


@pytest.mark.parametrize(
    ("direction", "native", "kind"),
    [("causal", False, Sum), ("bidirectional", False, Bidirectional), ("shared", False, Bidirectional),
     ("bidirectional", True, Sum)],
)  # fmt: skip
def test_directions(direction: str, native: bool, kind: type[Mixer]) -> None:
    encoder = Sums(direction, native)
    assert [type(layer.mixer) for layer in encoder.layers] == [kind, kind]
    assert encoder.causal == (direction == "causal")
    assert encoder.direction == direction


@pytest.mark.parametrize("direction", ["causal", "concat", "add", "shared"])
@pytest.mark.parametrize("ffn", ["gelu", "swiglu", "none"])
def test_cost_is_what_is_counted(direction: str, ffn: str) -> None:
    encoder = Sums(direction, ffn=ffn)
    counted = encoder_flops(encoder, 1, L)
    assert encoder.cost(L).matmul == counted.matmul > 0
    assert encoder.cost(L).total >= counted.forward


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_step_is_forward(positions: str, prenorm: bool) -> None:
    encoder, x = Sums(positions=positions, prenorm=prenorm).double(), inputs()
    torch.testing.assert_close(stepped(encoder, x), encoder(x, torch.ones(B, L, dtype=torch.bool)))


def test_no_recurrent_mode_when_the_future_is_seen() -> None:
    with pytest.raises(NotImplementedError, match="no recurrent mode when bidirectional"):
        Sums("bidirectional").init_state(B)


def test_positions() -> None:
    x = torch.zeros(1, L, D)
    everything = torch.ones(1, L, dtype=torch.bool)
    for kind in ("none", "sinusoidal", "learned"):
        encoder = Sums(positions=kind)
        encoder(x, everything)
        seen = sums(encoder)[0].seen
        assert seen is not None
        assert (len(seen[0].unique(dim=0)) == 1) == (kind == "none")
        assert ("positions" in dict(encoder.named_parameters())) == (kind == "learned")
        if kind == "none":
            continue
        with pytest.raises(ValueError, match=f"length {L + 1} exceeds the {L} positions"):
            encoder(torch.zeros(1, L + 1, D), torch.ones(1, L + 1, dtype=torch.bool))
    assert sinusoidal(5, 7).shape == (5, 7)


def test_losses_of_mixers_add_up() -> None:
    encoder = Sums("concat")
    loss = encoder.aux_loss()
    assert len(sums(encoder)) == 4
    assert loss is not None
    torch.testing.assert_close(loss, torch.stack([m.out.weight.square().sum() for m in sums(encoder)]).sum())


def test_dropout_only_when_training() -> None:
    encoder, x = Sums(dropout=0.5).double(), inputs()
    assert not torch.equal(encoder.train()(x, MASK), encoder(x, MASK))
    assert torch.equal(encoder.eval()(x, MASK), encoder(x, MASK))


@pytest.mark.parametrize(("norm", "own"), [("layer", 1e-5), ("rms", 1e-6), ("scale", 1e-5), ("batch", 1e-5)])
def test_norms_have_the_epsilon_that_is_asked_for(norm: str, own: float) -> None:
    """On features whose mean square is 1e-6; a batch norm that has seen no batch divides by a variance of 1."""
    x = 1e-3 * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(1, 3, D // 2)
    for given, epsilon in ((None, own), (1e-3, 1e-3)):
        encoder = Sums(norm=norm, norm_eps=given).double().eval()
        for module in (encoder.norm, encoder.blocks[0].norm, encoder.blocks[0].ffn_norm):
            assert module is not None
            power = 1.0 if norm == "batch" else 1e-6
            torch.testing.assert_close(module(x), x / (power + epsilon) ** 0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"exapnd": 2}, "unknown block.exapnd; did you mean 'expand'?"),
        ({"ffn": "gelly"}, "block.ffn is 'gelly'; one of gelu, relu, silu, swiglu, none, " + ", ".join(MIXTURES)),
        ({"norm": "group"}, "block.norm is 'group'; one of layer, rms, batch, scale"),
        ({"positions": "rope"}, "block.positions is 'rope'; one of none, sinusoidal, learned"),
        ({"expand": 0}, "block.expand is 0; more than 0"),
        ({"norm_eps": 0}, "block.norm_eps is 0; more than 0"),
    ],
)
def test_bad_blocks(block: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="block") as error:
        Sums(**block)
    assert str(error.value) == said


def test_bad_shapes_and_directions() -> None:
    for wrong in ("d_model", "n_layers", "length"):
        shape: dict[str, Any] = {"d_model": D, "n_layers": 1, "length": L, wrong: 0}
        with pytest.raises(ValueError, match=f"{wrong} is 0; at least 1"):
            Stack.__init__(Sums.__new__(Sums), lambda _: Sum(), **shape)
    with pytest.raises(ValueError, match="direction is 'backwards'; one of causal"):
        Sums("backwards")
    with pytest.raises(ValueError, match="direction is 'add'; one of causal, bidirectional"):
        Sums("add", native=True)


KEYS = ("dropped", "entropy", *(f"load_{e}" for e in range(4)))


@pytest.mark.parametrize("ffn", MIXTURES)
def test_any_stack_takes_experts(ffn: str) -> None:
    """Their losses join those of the mixers, what they count is reported, and padding is none of their business."""
    drops = ffn not in ("deepseek_moe", "soft_moe")
    encoder = Sums("concat", ffn=ffn, experts={"n_experts": 4} | ({"capacity": 0.5} if drops else {})).double()
    x = inputs()
    encoder(x, MASK)
    parts = [layer.ffn for layer in encoder.blocks]
    own = [part.loss for part in parts if isinstance(part, Experts) and part.loss is not None]
    mixers = torch.stack([m.out.weight.square().sum() for m in sums(encoder)]).sum()
    assert [type(part) for part in parts] == [MIXTURES[ffn]] * 2
    assert len(own) == (0 if ffn in ("expert_choice", "soft_moe") else 2)
    torch.testing.assert_close(encoder.aux_loss(), mixers + sum(own))
    found = encoder.diagnostics()
    assert list(found) == [f"ffn{i}.{name}" for i in (0, 1) for name in KEYS]
    assert (found["ffn1.dropped"] > 0) == drops
    assert 0 < found["ffn0.entropy"] <= 1
    assert sum(found[f"ffn0.load_{e}"] for e in range(4)) == pytest.approx(1)
    assert encoder.diagnostics() == {}
    encoder(x, MASK)
    encoder(x.where(MASK.unsqueeze(-1), 100.0), MASK)
    assert encoder.eval().diagnostics().keys() == found.keys()
    plain = encoder(x, MASK)[MASK]
    torch.testing.assert_close(encoder(x.where(MASK.unsqueeze(-1), 100.0), MASK)[MASK], plain)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"ffn": "switch", "experts": {"capacty": 1.0}}, "unknown block.experts.capacty; did you mean 'capacity'?"),
        ({"ffn": "switch", "experts": {"k": 2}}, "unknown block.experts.k; n_experts, capacity, activation"),
        ({"experts": {"k": 2}}, "block.experts has 'k', but block.ffn is 'gelu'; one of moe, switch"),
        ({"ffn": "moe", "experts": {"activation": "tanh"}}, "activation is 'tanh'; one of gelu, relu, swiglu"),
    ],
)
def test_bad_experts(block: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Sums(**block)
