"""Dropout: one mask along the sequence, after the embedding, on attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._dropout import Dropout, tie_dropout
from lra.errors import UserError
from lra.registry import architectures

D, L = 16, 12
STACKS = [name for name in architectures.names() if "block" in architectures.get(name).options()]
ON_WEIGHTS = [name for name in architectures.names() if "attention_dropout" in architectures.get(name).options()]
# the noise of the sorting is drawn anew in training; what luna unpacks passes two softmaxes
LINEAR_IN_THE_MASK = [name for name in ON_WEIGHTS if name not in ("sinkhorn", "luna")]


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return architectures.get(name)(d_model=D, n_layers=2, length=L, **options)


def test_a_tied_mask_drops_a_channel_at_all_tokens_or_none() -> None:
    torch.manual_seed(0)
    drop, x = Dropout(0.5), torch.rand(4, L, D) + 1
    plain = drop(x) / x
    assert ((plain == 0) | ((plain - 2).abs() < 1e-6)).all()
    assert (plain != plain[:, :1]).any()
    tie_dropout(drop, True)
    tied = drop(x) / x
    assert ((tied == 0) | ((tied - 2).abs() < 1e-6)).all()
    torch.testing.assert_close(tied, tied[:, :1].expand_as(tied))
    assert (tied[:, 0] == 0).any(dim=1).all()
    assert (tied[:, 0] != 0).any(dim=1).all()
    assert not torch.equal(tied[0, 0], tied[1, 0])
    assert drop(x[:, 0]).shape == (4, D)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("name", STACKS)
def test_a_block_ties_every_dropout_of_its_encoder(name: str) -> None:
    """But the one before S4's activation, which the released block does not tie, and that of a kernel's taps."""
    encoder = built(name, dropout=0.5, block={"tie_dropout": True})
    apart = [n for n, m in encoder.named_modules() if type(m) is nn.Dropout]
    assert [n for n in apart if not n.endswith(("inner_dropout", "kernel_drop"))] == []
    assert (apart != []) == (name in ("s4", "s4d", "longconv"))
    shared = [m for m in encoder.modules() if isinstance(m, Dropout)]
    assert shared
    assert all(m.tied for m in shared)
    assert not any(m.tied for m in built(name, dropout=0.5).modules() if isinstance(m, Dropout))


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_s4_drops_before_its_activation_and_after_it(name: str) -> None:
    mixer = built(name, dropout=0.5).layers[0].mixer.train()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("inner_dropout", "dropout"):
        mixer.get_submodule(part).register_forward_hook(
            lambda _, given, y, part=part: seen.update({part: (given[0], y)})
        )
    mixer(torch.randn(2, L, D), torch.ones(2, L, dtype=torch.bool))
    before, dropped = seen["inner_dropout"]
    assert (dropped == 0).any()
    assert (before != 0).all()
    assert torch.equal(seen["dropout"][0], F.gelu(dropped))


@pytest.mark.parametrize("name", ["transformer", "luna", "reformer", "rwkv4", "griffin"])
def test_the_embedding_is_dropped_once_with_its_positions(name: str) -> None:
    encoder = built(name, direction="causal", block={"embedding_dropout": 0.5}).train()
    calls: list[tuple[Tensor, Tensor]] = []
    encoder.embedding_dropout.register_forward_hook(lambda _, given, y: calls.append((given[0], y)))
    x, state = torch.randn(2, L, D), encoder.init_state(2)
    encoder(x, torch.ones(2, L, dtype=torch.bool))
    _, state = encoder.step(x[:, 0], state)
    encoder.chunk(x[:, 1:], state)
    # the chunks of reformer are a loop over steps
    assert [given.shape[1:] for given, _ in calls[:2]] == [(L, D), (D,)]
    assert len(calls) == (3 if name != "reformer" else 1 + L)
    entered, dropped = calls[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * entered[kept])
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(calls[1][0], entered[:, 0])
    if encoder.positions is not None:
        torch.testing.assert_close(entered, x + encoder.positions)


def test_the_embedding_is_dropped_in_both_directions_of_luna() -> None:
    encoder = built("luna", block={"embedding_dropout": 0.5}).train()
    calls: list[Tensor] = []
    encoder.embedding_dropout.register_forward_hook(lambda _, given, y: calls.append(y))
    encoder(torch.randn(2, L, D), torch.ones(2, L, dtype=torch.bool))
    assert len(calls) == 1


def test_who_drops_attention_weights() -> None:
    known = {
        "bigbird", "compressive", "cosformer", "entmax", "gqa", "h_transformer_1d", "hopfield", "linear_transformer",
        "linformer", "local", "longformer", "luna", "mixture_of_depths", "moe", "nystromformer", "perceiver",
        "performer", "reformer", "sinkhorn", "sparse", "switch", "synthesizer", "transformer", "transformer_xl",
        "universal",
    }  # fmt: skip
    assert known <= set(ON_WEIGHTS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LINEAR_IN_THE_MASK),
        ("local", {"before": 1, "size": 4}), ("longformer", {"window": 2, "direction": "causal"}),
        ("transformer", {"positions": "alibi"}), ("transformer", {"positions": "t5"}),
        ("transformer", {"positions": "shaw"}), ("performer", {"direction": "causal"}),
        ("sparse", {"pattern": "fixed"}), ("synthesizer", {"logits": "random"}),
    ],
)  # fmt: skip
def test_attention_dropout_keeps_the_mean(name: str, options: dict[str, Any]) -> None:
    """Over a batch of equal sequences, whose masks are drawn apart."""
    encoder = built(name, attention_dropout=0.3, **options).double()
    mixer, rows = encoder.layers[0].mixer, 2000
    x = torch.randn(1, L, D, dtype=torch.float64)
    mask = torch.arange(L).expand(1, L) < L - 2
    x = x * mask.unsqueeze(-1)
    with torch.no_grad():
        whole = mixer.eval()(x, mask)[:, : L - 2]
        y = mixer.train()(x.expand(rows, -1, -1), mask.expand(rows, -1))[:, : L - 2]
    deviation = y.std(dim=0)
    assert (deviation.mean() > 0.02 * whole.abs().mean()).all()
    assert ((y.mean(dim=0) - whole[0]).abs() <= 5 * deviation / rows**0.5 + 1e-12).all()


def test_the_sorted_blocks_of_sinkhorn_are_dropped_too() -> None:
    x, mask = torch.randn(2, L, D), torch.ones(2, L, dtype=torch.bool)
    ys = []
    for rate in (0.0, 0.9):
        encoder = built("sinkhorn", attention_dropout=rate).train()
        torch.manual_seed(1)
        ys.append(encoder(x, mask))
    assert not torch.equal(*ys)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_evaluation_drops_no_attention_weights(name: str) -> None:
    x, mask = torch.randn(2, L, D), torch.ones(2, L, dtype=torch.bool)
    ys = [built(name, attention_dropout=rate).eval()(x, mask) for rate in (0.0, 0.9)]
    assert torch.equal(*ys)


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_a_rate_that_drops_everything_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"attention_dropout is 1\.0; from 0 up to, not including, 1"):
        built(name, attention_dropout=1.0)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"embedding_dropout": 1.0}, r"block\.embedding_dropout is 1\.0; from 0 up to, not including, 1"),
        ({"tie_dropout": 1}, r"block\.tie_dropout is 1; true or false"),
    ],
)
def test_wrong_settings_are_named(block: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        built("gru", block=block)
