"""reformer against Hugging Face's hashing, the dense definition, and autograd through the same layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_attention import distances, real_prefixes
from golden_tensors import golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures._reversible import Step, reversible
from lra.architectures.attention import reformer
from lra.architectures.attention.reformer import ITSELF, LSHMixer, Reformer
from lra.attention import merge_heads, split_heads
from lra.conformance.suite import check

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 32, "chunk": 4}


@pytest.mark.parametrize("name", ["reformer_lsh", "reformer_lsh_causal"])
def test_buckets_equal_hugging_face(name: str) -> None:
    """Their numbers go on from round to round, with one more in each for padding."""
    g = golden(name)
    heads, size, rounds, buckets = (int(g[f"cfg.{n}"]) for n in ("H", "d", "n_hashes", "n_buckets"))
    mixer = LSHMixer(
        int(g["cfg.D"]),
        n_heads=heads,
        width=heads * size,
        positions="none",
        causal=False,
        n_hashes=rounds,
        n_buckets=buckets,
        chunk=4,
    ).double()
    mixer.load_state_dict(
        {"query_key.weight": g["param.query_key.weight"], "rotations": g["mid.rotations"]}, strict=False
    )
    found = mixer.buckets(g["x"], g["mask"] > 0).long()
    offset = torch.arange(rounds)[:, None] * (buckets + 1)
    assert not (g["mask"] > 0).all()
    assert torch.equal(found + offset, g["mid.buckets"])
    assert torch.equal(found.sort(dim=-1, stable=True).indices, g["mid.sorted_positions"])


def loaded(g: dict[str, Tensor], rounds: slice = slice(None)) -> LSHMixer:
    """Their maps and some of their rounds; they return the heads before the output map, which is the identity here."""
    heads, size, buckets, chunk = (int(g[f"cfg.{n}"]) for n in ("H", "d", "n_buckets", "chunk"))
    rotations, causal = g["mid.rotations"][:, :, rounds], bool(g["cfg.causal"])
    mixer = LSHMixer(
        int(g["cfg.D"]),
        n_heads=heads,
        width=heads * size,
        positions="none",
        causal=causal,
        n_hashes=rotations.shape[2],
        n_buckets=buckets,
        chunk=chunk,
    ).double()
    mixer.load_state_dict({
        "query_key.weight": g["param.query_key.weight"],
        "value.weight": g["param.value.weight"],
        "out.weight": torch.eye(heads * size, dtype=torch.float64),
        "rotations": rotations,
    })  # fmt: skip
    return mixer


@pytest.mark.parametrize("name", ["reformer_lsh", "reformer_lsh_causal"])
def test_forward_equals_hugging_face_over_its_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who sees whom is replaced by their rule: chunks look around the ends and into the next round, at any
    bucket, and a key counts as often as it is seen."""
    g = golden(name)
    x, real = g["x"].requires_grad_(), g["mask"] > 0
    offsets = range(-int(g["cfg.before"]), int(g["cfg.after"]) + 1)

    def seen(t: Tensor, first: float = 0) -> Tensor:
        """(B, H, r, chunks, m, ...) -> (B, H, r, chunks, keys, ...)."""
        return torch.cat([t.flatten(2, 3).roll(-o, 2) for o in offsets], 3).unflatten(2, t.shape[2:4])

    def bias(self: LSHMixer, order: Tensor, place: Tensor, buckets: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        at = order.unflatten(3, (-1, m))
        keys = seen(at).unsqueeze(-2)
        token = real[:, None, None].expand_as(order).gather(3, order).view_as(at)
        hidden = ~seen(token).unsqueeze(-2) | ((keys > at.unsqueeze(-1)) & self.causal)
        scores = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -1e9)
        return scores.masked_fill(keys == at.unsqueeze(-1), ITSELF)

    monkeypatch.setattr(reformer, "with_chunk_before", seen)
    monkeypatch.setattr(LSHMixer, "bias", bias)
    y = loaded(g)(x, real)
    # a score near -1e5 keeps eleven digits behind the point
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-10)


def hugging_face_probabilities(g: dict[str, Tensor], s: int) -> Tensor:
    """Theirs of round s, from sorted chunks to tokens: (B, H, L, L)."""
    order, chunk = g["mid.sorted_positions"], int(g["cfg.chunk"])
    offsets = range(-int(g["cfg.before"]), int(g["cfg.after"]) + 1)
    at = order.flatten(2).unflatten(2, (-1, chunk))  # (B, H, chunks of all rounds, m)
    keys = torch.cat([at.roll(-o, 2) for o in offsets], 3)
    # in one chunk each key stands once in its own round; the last and first chunk also see the other round
    own = torch.cat([(torch.arange(at.shape[2]) * chunk // order.shape[3]).roll(-o)[:, None] for o in offsets], 1)
    own = own.repeat_interleave(chunk, 1) == s
    p = g["mid.attention_probs"].masked_fill(~own[:, None], 0)
    found = torch.zeros(*order.shape[:2], order.shape[3], order.shape[3], dtype=torch.float64)
    for c in range(s * order.shape[3] // chunk, (s + 1) * order.shape[3] // chunk):
        rows = torch.zeros(*order.shape[:2], chunk, order.shape[3], dtype=torch.float64)
        rows.scatter_add_(3, keys[:, :, None, c].expand(-1, -1, chunk, -1), p[:, :, c])
        found.scatter_(2, at[:, :, c].unsqueeze(-1).expand_as(rows), rows)
    return found


@pytest.mark.parametrize("s", [0, 1])
@pytest.mark.parametrize("name", ["reformer_lsh", "reformer_lsh_causal"])
def test_forward_and_step_weigh_keys_as_hugging_face(name: str, s: int) -> None:
    """The pattern is ours, a part of theirs; among the keys that both see, the weights are their probabilities."""
    g = golden(name)
    mixer, real = loaded(g, slice(s, s + 1)), g["mask"] > 0
    sees = seen_by(mixer, mixer.buckets(g["x"], real)) & real[:, None, None] & ~torch.eye(16, dtype=torch.bool)
    weights = hugging_face_probabilities(g, s) * sees
    assert ((sees.sum(-1) > 1) & real[:, None]).sum() > 20, "hardly a token has a choice: the test shows nothing"
    assert ((weights > 0) == sees)[real[:, None].expand(-1, 2, -1)].all(), "their chunks miss some of our keys"
    alone = torch.eye(16, dtype=torch.float64) * ~sees.any(-1, keepdim=True)
    weights = alone + weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    expected = merge_heads(weights @ split_heads(g["x"] @ g["param.value.weight"].T, 2))[real]
    torch.testing.assert_close(mixer(g["x"], real)[real], expected, rtol=0, atol=1e-13)
    if mixer.causal:
        torch.testing.assert_close(stepped(mixer, g["x"])[real], expected, rtol=0, atol=1e-13)


def test_scores_in_one_bucket_have_the_spread_of_the_queries() -> None:
    """Half the tokens are a e0 + b e1, half a e0 - b e1: q . k / |k| is 2 b^2 / |q| larger for a key of its half than
    for one of the other, which gives the entropy of each row in closed form, for 64 features and 64 tokens. The values
    are one-hot, so that the probabilities come out. Divided by sqrt(64) again, the rows would be nearly uniform."""
    a, b = 4.0, 3.0
    mixer = LSHMixer(
        128, n_heads=1, width=64, positions="none", causal=False, n_hashes=1, n_buckets=2, chunk=64
    ).double()
    identity = torch.eye(64, dtype=torch.float64)
    x = torch.zeros(1, 64, 128, dtype=torch.float64)
    x[..., 64:] = identity
    x[..., 0], x[..., 1] = a, b * (1 - 2 * (torch.arange(64) % 2))
    zeros = torch.zeros_like(identity)
    mixer.query_key.weight.data, mixer.value.weight.data = (
        torch.cat([identity, zeros], 1),
        torch.cat([zeros, identity], 1),
    )
    mixer.out.weight.data = torch.cat([identity, zeros])
    with torch.no_grad():
        y = mixer(x, torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 1, 1, 64, dtype=torch.int16))[0, :, :64]
    entropy = -torch.special.xlogy(y, y).sum(-1)
    likelier = math.exp(2 * b**2 / math.sqrt(a**2 + b**2 + 64e-6))
    total = 31 * likelier + 32
    expected = math.log(total) - 31 * likelier * math.log(likelier) / total
    torch.testing.assert_close(entropy, torch.full_like(entropy, expected), rtol=0, atol=1e-12)
    assert expected < 3.6, "far from the log(63) = 4.14 of a uniform row"


def test_near_vectors_share_buckets() -> None:
    """The property of the hash: the nearer two vectors, the likelier one bucket; opposites never."""
    torch.manual_seed(0)
    mixer = LSHMixer(16, n_heads=1, width=16, positions="none", causal=False, n_hashes=400, n_buckets=8, chunk=4)
    torch.nn.init.eye_(mixer.query_key.weight)
    x = torch.nn.functional.normalize(torch.randn(1, 1, 16), dim=-1)
    other = torch.randn(1, 1, 16)
    other = torch.nn.functional.normalize(other - (other * x).sum() * x, dim=-1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    own = mixer.buckets(x, mask)
    angles = torch.tensor([0.0, 0.3, 0.8, 1.57, 3.14159])
    same = [(mixer.buckets(x * a.cos() + other * a.sin(), mask) == own).float().mean().item() for a in angles]
    assert same[0] == 1
    assert same[1] > same[2] + 0.1 > same[3] + 0.2
    assert abs(same[3] - 1 / 8) < 5 * (1 / 8 * 7 / 8 / 400) ** 0.5
    assert same[4] == 0


def seen_by(mixer: LSHMixer, buckets: Tensor) -> Tensor:
    """Equation 6 with an explicit L x L mask, over all rounds: (B, H, L, L)."""
    length = buckets.shape[-1]
    place = (buckets.long() * length + torch.arange(length)).argsort(-1).argsort(-1)
    near, reach = (place, mixer.chunk_size) if mixer.causal else (place // mixer.chunk_size, 1)
    apart = near[..., None] - near[..., None, :]
    return ((buckets[..., None] == buckets[..., None, :]) & (apart >= 0) & (apart <= reach)).any(2)


@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_dense_definition(causal: bool, rounds: int, positions: str) -> None:
    """Softmax over what any round lets in, each key once: outputs and gradients in float64."""
    torch.manual_seed(0)
    mixer, mask = (
        LSHMixer(
            16, n_heads=4, width=16, positions=positions, causal=causal, n_hashes=rounds, n_buckets=4, chunk=4
        ).double(),
        real_prefixes(30, 19, 1),
    )
    leaf = torch.randn(3, 30, 16, dtype=torch.float64).requires_grad_()
    x = leaf.masked_fill(~mask[..., None], 0)
    sees = seen_by(mixer, mixer.buckets(x, mask))
    q, k = mixer.queries_and_keys(split_heads(mixer.query_key(x), 4))
    scores = q @ k.mT
    if mixer.slopes is not None:
        scores = scores - mixer.slopes[:, None, None] * distances(30).abs()
    scores = scores.masked_fill(~sees, -torch.inf) - 1e5 * torch.eye(30, dtype=torch.float64)
    dense = mixer.out(merge_heads(scores.softmax(-1) @ split_heads(mixer.value(x), 4)))[mask]
    y = mixer(x, mask)[mask]
    torch.testing.assert_close(y, dense, rtol=0, atol=1e-11)
    weight, given = torch.randn_like(y), [leaf, *mixer.parameters()]
    grads = (torch.autograd.grad(t, given, weight, retain_graph=True) for t in (y, dense))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    if not causal:
        assert not torch.equal(sees, torch.ones_like(sees)), "the test must leave something out"


def plain(encoder: Reformer, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same layers, differentiated by autograd."""
    x1 = x2 = x
    for layer in encoder.blocks:
        assert layer.ffn is not None
        assert layer.ffn_norm is not None
        h = layer.norm(x2).masked_fill(~mask[..., None], 0)
        x1 = x1 + layer.dropout(layer.mixer(h, mask))
        x2 = x2 + layer.dropout(layer.ffn(layer.ffn_norm(x1)))
    return x1, x2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_reversible_equals_autograd(dropout: float) -> None:
    torch.manual_seed(0)
    encoder = Reformer(**{**SMALL, "n_layers": 4}, positions="none", dropout=dropout).double()
    mask = real_prefixes(30, 17)
    x = torch.randn(2, 30, 16, dtype=torch.float64).requires_grad_()
    weight = torch.randn(2, 2, 30, 16, dtype=torch.float64) * mask[..., None]
    given, found = [x, *(p for layer in encoder.layers for p in layer.parameters())], []
    for run in (encoder.streams, lambda *a: plain(encoder, *a)):
        torch.manual_seed(5)
        y = torch.stack(run(x, mask))
        found.append([y * mask[..., None], *torch.autograd.grad(y, given, weight)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def wrapped(scores: Tensor, chunk: int, before: int, after: int, self_slots: Tensor | None = None) -> Tensor:
    """Hugging Face's chunks over slots in order, each seeing `before` back and `after` ahead, around the ends; a slot
    met twice counts twice. self_slots: pairs that only count when nothing else does. (..., S, S) -> scores."""
    number = torch.arange(scores.shape[-1]) // chunk
    count = number[-1] + 1
    times = sum((number == (number[:, None] + o) % count).double() for o in range(-before, after + 1))
    assert isinstance(times, Tensor)
    scores = scores if self_slots is None else torch.where(self_slots, -1e5, scores)
    return scores + times.log()


def hugging_face_layer(g: dict[str, Tensor], i: int) -> Step:
    """Layer i of `reformer_reversible`, from the conventions of their modules: no masks, activations dense - relu."""
    names = [n for n in g if n.startswith(f"param.{i}.")]
    own = {n.removeprefix(f"param.{i}."): torch.nn.Parameter(g[n]) for n in names}
    heads, size, chunk, before, after = (int(g[f"cfg.{n}"]) for n in ("H", "d", "chunk", "before", "after"))
    norm = torch.nn.functional.layer_norm
    assert not int(g["cfg.causal"])

    def project(x: Tensor, name: str) -> Tensor:
        return split_heads(x @ own[f"attention.self_attention.{name}.weight"].T, heads)

    def f(x: Tensor, _: Any) -> tuple[Tensor, Any]:
        h = norm(x, x.shape[-1:], own["attention.layer_norm.weight"], own["attention.layer_norm.bias"], 1e-12)
        v = project(h, "value")
        if i % 2 == 0:
            scores = project(h, "query") @ project(h, "key").mT / size**0.5
            y = wrapped(scores, chunk, before, after).softmax(-1) @ v
        else:
            qk = project(h, "query_key")
            k = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt() / size**0.5
            turned = torch.einsum("bhld,hdrn->bhrln", qk, g["mid.rotations"])
            rounds = torch.arange(turned.shape[2])[:, None] * int(g["cfg.n_buckets"])
            buckets = (torch.cat([turned, -turned], -1).argmax(-1) + rounds).flatten(2)
            order = buckets.sort(dim=-1, stable=True).indices
            at = (order % x.shape[1]).unsqueeze(-1).expand(-1, -1, -1, size)
            q, k, v = (t.gather(2, at) for t in (qk, k, v))
            scores = wrapped(q @ k.mT, chunk, before, after, at[..., :1] == at[..., 0].unsqueeze(-2))
            back = order.argsort(-1)
            y = (scores.softmax(-1) @ v).gather(2, back.unsqueeze(-1).expand_as(at)).unflatten(2, (len(rounds), -1))
            share = scores.logsumexp(-1).gather(2, back).unflatten(2, (len(rounds), -1)).softmax(2)
            y = (y * share.unsqueeze(-1)).sum(2)
        return merge_heads(y) @ own["attention.output.dense.weight"].T, None

    def feedforward(x: Tensor) -> Tensor:
        h = norm(x, x.shape[-1:], own["feed_forward.layer_norm.weight"], own["feed_forward.layer_norm.bias"], 1e-12)
        h = torch.relu(h @ own["feed_forward.dense.dense.weight"].T + own["feed_forward.dense.dense.bias"])
        return h @ own["feed_forward.output.dense.weight"].T + own["feed_forward.output.dense.bias"]

    parts = ([p for n, p in own.items() if n.startswith(kind)] for kind in ("attention", "feed_forward"))
    return Step(f, feedforward, *parts)


def test_reversible_equals_hugging_face() -> None:
    """Their layers through our reversible pass: outputs, the input recovered, and the gradients of their own pass."""
    g = golden("reformer_reversible")
    steps = [hugging_face_layer(g, i) for i in range(int(g["cfg.n_layers"]))]
    x = g["x"].requires_grad_()
    y1, y2 = reversible(x, x, steps, random=False)
    torch.testing.assert_close(torch.cat([y1, y2], -1), g["y"], rtol=0, atol=1e-11)
    (torch.cat([y1, y2], -1) * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-9)
    for i, step in enumerate(steps):
        names = [n.removeprefix(f"param.{i}.") for n in g if n.startswith(f"param.{i}.")]
        sides = (("attention", step.f_parameters), ("feed_forward", step.g_parameters))
        for kind, parameters in sides:
            for name, p in zip([n for n in names if n.startswith(kind)], parameters, strict=True):
                if (wanted := g.get(f"gradparam.{i}.{name}")) is not None:
                    torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-9)


def test_going_back_keeps_the_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovered inputs differ in the last digit, which could move a token to another bucket."""
    torch.manual_seed(0)
    encoder, x = Reformer(**SMALL), torch.randn(2, 32, 16).requires_grad_()
    y1, y2 = encoder.streams(x, torch.ones(2, 32, dtype=torch.bool))
    monkeypatch.delattr(LSHMixer, "buckets")
    (y1 * y2).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


@torch.no_grad()
def test_inputs_are_recovered_from_outputs() -> None:
    torch.manual_seed(0)
    encoder = Reformer(**{**SMALL, "n_layers": 6}, positions="none").double().eval()
    x, mask = torch.randn(2, 32, 16, dtype=torch.float64), torch.ones(2, 32, dtype=torch.bool)
    y1, y2 = encoder.streams(x, mask)
    assert (y1 - x).abs().max() > 0.1
    for layer in reversed(encoder.blocks):
        assert layer.ffn is not None
        assert layer.ffn_norm is not None
        y2 = y2 - layer.ffn(layer.ffn_norm(y1))
        y1 = y1 - layer.mixer(layer.norm(y2), mask)
    torch.testing.assert_close(y1, x, rtol=0, atol=1e-13)
    torch.testing.assert_close(y2, x, rtol=0, atol=1e-13)


def test_memory_does_not_grow_with_depth() -> None:
    """What the graph keeps besides parameters: one pair of streams, and two bytes per token, head, round and layer."""
    held = {}
    for n_layers in (2, 8):
        torch.manual_seed(0)
        encoder = Reformer(**{**SMALL, "n_layers": n_layers})
        own = {p.data_ptr() for p in encoder.parameters()}
        sizes: list[int] = []

        def keep(t: Tensor, own: set[int] = own, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if t.data_ptr() in own else t.nbytes)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y1, _ = encoder.streams(torch.randn(3, 32, 16).requires_grad_(), torch.ones(3, 32, dtype=torch.bool))
        history: Any = y1.grad_fn
        buckets = [kept.nbytes for _, kept, _ in history.history]
        assert buckets == [3 * 4 * 2 * 32 * 2] * n_layers
        held[n_layers] = sum(sizes)
    assert held[2] == held[8] == 2 * 3 * 32 * 16 * 4


def test_rotations_are_saved_and_differ_between_layers() -> None:
    torch.manual_seed(0)
    one = Reformer(**SMALL)
    names = [name for name in one.state_dict() if name.endswith("rotations")]
    assert len(names) == 2
    assert not torch.equal(*(one.state_dict()[name] for name in names))


def test_with_small_chunks_it_is_a_sound_encoder() -> None:
    only = ["padding", "padding_length", "batch", "gradients", "causal", "step", "precision", "seed"]
    for options in ({"chunk": 5, "n_hashes": 3}, {"chunk": 4, "n_hashes": 1, "positions": "rope"}):
        assert not [f.message for f in check("reformer", only=only, options=options) if f.failed]


test_wrong_arguments_are_named = refuses(Reformer, **SMALL)(
    ({"chunk": 0}, "chunk is 0; at least 1"),
    ({"n_buckets": 3}, "n_buckets is 3; an even number from 2"),
    ({"block": {"ffn": "none"}}, "a reversible layer has a feed-forward part"),
    ({"block": {"prenorm": False}}, "norms before its parts"),
)
