"""sinkhorn against the package sinkhorn-transformer, a loop over blocks, and the dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import real_prefixes
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.attention import sinkhorn
from lra.architectures.attention.sinkhorn import Sinkhorn, SinkhornMixer, balanced, brought, sorted_attention
from lra.attention import merge_heads, split_heads
from lra.conformance.suite import check

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 24, "size": 4}


def package_logits(g: dict[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Theirs, log(relu(score) + 1e-6) + noise over the temperature: (B, H, N, W, d) twice -> (B, H, N, N)."""
    if "param.sort_net.linear" in g:
        pooled = torch.cat([q.sum(3), k.sum(3)], dim=-1)
        score = torch.einsum("bhnd,hdm->bhnm", pooled, g["param.sort_net.linear"][0])[..., : q.shape[2]]
    else:
        score = q.mean(3) @ k.mean(3).mT / q.shape[-1] ** 0.5
    noise = g["mid.gumbel"].unflatten(0, (int(g["cfg.B"]), int(g["cfg.H"])))[: len(q)]
    return ((score.relu() + 1e-6).log() + noise) / float(g["cfg.temperature"])


@pytest.mark.parametrize("name", ["sinkhorn_gumbel", "sinkhorn_gumbel_sortnet"])
def test_balancing_and_attention_equal_the_package(name: str) -> None:
    """With padding, and with the values sorted (theirs takes the keys for them)."""
    g = golden(name)
    q, k, v = (g[f"in.{n}"].unflatten(2, (-1, int(g["cfg.block"]))) for n in "qkv")
    sort = balanced(package_logits(g, q, k), int(g["cfg.iters"]))
    torch.testing.assert_close(sort.flatten(0, 1), g["mid.R"], rtol=0, atol=1e-12)
    real = (g["mask"] > 0).unflatten(1, (-1, int(g["cfg.block"])))
    y = sorted_attention(q, k, v, real, sort).flatten(2, 3)
    rows = (g["mask"] > 0)[:, None, :, None]
    torch.testing.assert_close(y * rows, g["mid.y_intended"] * rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sinkhorn_gumbel", "sinkhorn_gumbel_sortnet"])
def test_layer_equals_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer whose maps hand on q, k and v, sorted by their logits: the row without padding, whose values are mixed
    into other blocks only there. First as intended, then with their fault, for which the gradients are stored."""
    g = golden(name)
    heads, size, block = (int(g[f"cfg.{n}"]) for n in ("H", "d", "block"))
    width = heads * size
    mixer = SinkhornMixer(
        3 * width,
        n_heads=heads,
        width=width,
        positions="none",
        size=block,
        iterations=int(g["cfg.iters"]),
        temperature=0.75,
        length=12,
    ).double()
    identity = torch.eye(3 * width, dtype=torch.float64)
    state = {"qkv.weight": identity, "out.weight": identity[:, :width]}
    mixer.load_state_dict(state, strict=False)
    row = g["mask"].all(1)
    given = [g[f"in.{n}"][row].requires_grad_() for n in "qkv"]

    def sorting(x: Tensor, real: Tensor) -> Tensor:
        q, k, _ = (t.unflatten(2, (-1, block)) for t in mixer.heads(x))
        return balanced(package_logits(g, q, k), mixer.iterations)

    monkeypatch.setattr(mixer, "sorting", sorting)
    x, mask = torch.cat([merge_heads(t) for t in given], dim=-1), torch.ones(1, 12, dtype=torch.bool)
    y = split_heads(mixer(x, mask)[..., :width], heads)
    torch.testing.assert_close(y, g["mid.y_intended"][row], rtol=0, atol=1e-12)
    of_keys: list[Tensor] = []

    def keys_for_values(sort: Tensor, blocks: Tensor) -> Tensor:
        of_keys.append(brought(sort, blocks))
        return of_keys[0]

    monkeypatch.setattr(sinkhorn, "brought", keys_for_values)
    y = split_heads(mixer(x, mask)[..., :width], heads)
    torch.testing.assert_close(y, g["y"][row], rtol=0, atol=1e-12)
    for n, grad in zip("qkv", torch.autograd.grad(y, given, g["w"][row]), strict=True):
        torch.testing.assert_close(grad, g[f"grad.{n}"][row], rtol=0, atol=1e-9)


def test_balancing_is_doubly_stochastic() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    sort = balanced(logits, 100)
    ones = torch.ones(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(sort.sum(-1), ones, rtol=0, atol=1e-6)
    torch.testing.assert_close(sort.sum(-2), ones, rtol=0, atol=1e-12)
    hard = balanced(logits / 0.001, 2000)
    assert ((hard < 0.01) | (hard > 0.99)).all(), "cold, it is a permutation"


def mixer_and_input(training: bool, **options: Any) -> tuple[SinkhornMixer, Tensor, Tensor]:
    torch.manual_seed(0)
    options |= {"n_heads": 4, "width": 16, "positions": "none", "size": 4, "iterations": 5, "length": 24}
    mixer = SinkhornMixer(16, temperature=0.75, **options).double().train(training)
    mask = real_prefixes(22, 9, 3)
    return mixer, torch.randn(3, 22, 16, dtype=torch.float64), mask


def shares(scores: Tensor, causal: bool) -> Tensor:
    """Five rounds of balancing of (H, N, N), share by share."""
    blocks = scores.shape[-1]
    now = {(u, v): scores[:, u, v] for u in range(blocks) for v in range(u if causal else blocks)}
    for _ in range(5):
        rows = {u: sum(now[p] for p in now if p[0] == u) for u, _ in now}
        now = {(u, v): share / rows[u] for (u, v), share in now.items()}
        last = {(u, v): u if causal else blocks for u, v in now}
        now = {p: now[p] / sum(now[q] for q in now if q[1] == p[1] and q[0] <= last[p]) for p in now}
    zero = torch.zeros_like(scores[:, 0, 0])
    return torch.stack([torch.stack([now.get((u, v), zero) for v in range(blocks)], -1) for u in range(blocks)], -2)


@pytest.mark.parametrize(
    ("training", "options"), [(False, {}), (True, {}), (True, {"causal": True}), (False, {"sortcut": 2})]
)
def test_equals_a_loop_over_blocks(training: bool, options: dict[str, Any]) -> None:
    """Each row of the batch cut to its own blocks, each block's keys written out: outputs and gradients."""
    mixer, leaf, mask = mixer_and_input(training, **options)
    causal, cut = mixer.causal, mixer.sortcut
    x = leaf.requires_grad_().masked_fill(~mask[..., None], 0)
    torch.manual_seed(3)
    y = mixer(x, mask)[mask]
    torch.manual_seed(3)
    noise = -torch.empty(3, 4, 6, 6, dtype=torch.float64).exponential_().log() * training
    found = []
    for row, length in enumerate((22, 9, 3)):
        own, blocks = x[row, :length], -(-length // 4)
        parts = own.split(4)
        pooled = torch.stack([own[: 4 * u + 1].sum(0) if causal else part.sum(0) for u, part in enumerate(parts)])
        logits = (mixer.sort(mixer.pool(pooled).relu()).relu()).unflatten(-1, (4, 6)).transpose(0, 1)[..., :blocks]
        sort = shares(((logits + noise[row, :, :blocks, :blocks]) / 0.75).exp(), causal)
        qkv = mixer.qkv(own).unflatten(-1, (3, 4, 4))
        for u, part in enumerate(parts):
            heads = []
            for h in range(4):
                q, k, v = qkv[:, :, h].unbind(1)
                sources = range(min(cut, blocks)) if cut else range(u, u + 1)
                brought: list[list[Tensor]] = []
                for t in (k, v):
                    full = F.pad(t, (0, 0, 0, blocks * 4 - length)).unflatten(0, (-1, 4))
                    mixed = [sum(s * block for s, block in zip(sort[h, m], full, strict=True)) for m in sources]
                    kept = [len(parts[int(sort[h, m].argmax())]) for m in sources]
                    brought.append([] if causal and u == 0 else [t[:n] for t, n in zip(mixed, kept, strict=True)])
                at = slice(4 * u, 4 * u + len(part))
                keys, values = (torch.cat([*some, t[at]]) for some, t in zip(brought, (k, v), strict=True))
                scores = q[at] @ keys.T / 2
                if causal:
                    later = torch.ones(len(part), len(part), dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(F.pad(later, (len(keys) - len(part), 0)), -torch.inf)
                heads.append(scores.softmax(-1) @ values)
            found.append(mixer.out(torch.cat(heads, dim=-1)))
    expected = torch.cat(found)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weight, given = torch.randn_like(y), [leaf, *mixer.parameters()]
    grads = (torch.autograd.grad(t, given, weight, retain_graph=True) for t in (y, expected))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_a_hard_permutation_is_a_dense_mask() -> None:
    """Brought exactly one other block, a block's softmax is that under an explicit L x L mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4, 8, dtype=torch.float64)
    source = torch.tensor([[1, 2, 3, 4, 0], [3, 4, 1, 0, 2]])
    sort = F.one_hot(source, 5).double()[None]
    real = torch.ones(1, 5, 4, dtype=torch.bool)
    block = torch.arange(20) // 4
    sees = (block == block[:, None]) | (block == source[:, block, None])
    # head 1, block 2: brought its own, which then counts twice
    source[1, 2], sees[1, 8:12] = 2, True
    rows = [i for i in range(20) if not 8 <= i < 12]
    y = sorted_attention(q, k, v, real, sort).flatten(2, 3)
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    dense = F.scaled_dot_product_attention(q, k, v, sees[None])
    torch.testing.assert_close(y[:, :, rows], dense[:, :, rows], rtol=0, atol=1e-12)


def test_noise_is_gumbel_and_in_training_only() -> None:
    mixer, x, mask = mixer_and_input(training=False)
    assert torch.equal(mixer(x, mask), mixer(x, mask))
    mixer.train()
    assert not torch.equal(mixer(x, mask), mixer(x, mask))


def test_with_small_blocks_it_is_a_sound_encoder() -> None:
    only = ["padding", "padding_length", "batch", "gradients", "causal", "seed"]
    causal = {"direction": "causal"}
    for options in ({"size": 5}, {"size": 3, "positions": "rope"}, {"size": 5, **causal}, {"size": 5, "sortcut": 3}):
        assert not [f.message for f in check("sinkhorn", only=only, options=options) if f.failed]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": 0}, "size is 0"),
        ({"positions": "alibi"}, "no distance"),
        ({"direction": "causal", "sortcut": 1}, "bidirectional only"),
        ({"sortcut": -1}, "sortcut is -1"),
        ({"temperature": 0.0}, "temperature is 0.0; more than 0"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sinkhorn(**{**SMALL, **wrong})
    with pytest.raises(ValueError, match="7 blocks of 4 tokens; this layer was built for 6"):
        Sinkhorn(**SMALL, positions="none")(torch.zeros(1, 25, 16), torch.ones(1, 25, dtype=torch.bool))
