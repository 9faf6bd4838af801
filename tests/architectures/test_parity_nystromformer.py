"""nystromformer against tensors of Hugging Face's layer, the authors' iteration, its equations, softmax attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from golden_tensors import golden
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.attention import nystromformer
from lra.architectures.attention.nystromformer import Nystromformer, NystromformerMixer, inverse, segment_means
from lra.attention import merge_heads, split_heads


@pytest.mark.parametrize("start", ["exact", "original"])
def test_layer_equals_hugging_face_but_for_the_departures(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its segments and its convolution, which take in what stands at the padding, and for "original" with a start
    whose norm is the largest of the batch."""
    g = golden(f"nystrom_hf_{start}")
    mixer = NystromformerMixer(12, n_heads=2, qkv_dim=12, landmarks=4, kernel=5, iterations=6).double()
    names = ("query", "key", "value")
    mixer.load_state_dict({
        "qkv.weight": torch.cat([g[f"param.{name}.weight"] for name in names]),
        "qkv.bias": torch.cat([g[f"param.{name}.bias"] for name in names]),
        "conv.weight": g["param.conv.weight"],
        "out.weight": torch.eye(12),
        "out.bias": torch.zeros(12),
    })  # fmt: skip
    x = g["x"].requires_grad_()
    full, values = g["mask"].bool(), mixer.heads(x)[2]
    assert full.all(1).tolist() == [True, False]
    found = []

    def recorded(A: Tensor, Z: Tensor, iterations: int) -> Tensor:
        torch.testing.assert_close(A, g["mid.kernel2"][: len(A)], rtol=0, atol=1e-12)
        found.append(inverse(A, A.mT / A.sum(-2).amax() if start == "original" else Z, iterations))
        return found[-1]

    monkeypatch.setattr(nystromformer, "inverse", recorded)
    if start == "exact":
        torch.testing.assert_close(mixer(x[:1], full[:1]), g["y"][:1], rtol=0, atol=1e-12)
    monkeypatch.setattr(nystromformer, "segment_means", means_with_padding)
    mixer.conv.register_forward_pre_hook(lambda _, __: values)
    y = mixer(x, full)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[-1], g["mid.pinv"], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=0, atol=1e-11)


def means_with_padding(x: Tensor, mask: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    return x.unflatten(1, (segments, -1)).mean(2), torch.ones(len(x), segments, dtype=torch.bool)


@pytest.mark.parametrize("name", ["nystrom_mlpen_lra", "nystrom_mlpen_reorganized"])
def test_equals_the_authors_but_for_the_departures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their segments, which take zeros at the padding into their means, and their start, whose norm is the largest
    of the batch: both rows and every gradient."""
    g = golden(name)
    heads, size, m = (int(g[f"cfg.{n}"]) for n in ("H", "d", "m"))
    mixer = NystromformerMixer(
        8, n_heads=heads, qkv_dim=heads * size, landmarks=m, kernel=int(g["cfg.conv"]), iterations=6
    ).double()
    mixer.conv.load_state_dict({"weight": g["param.conv.weight"]})
    found = []

    def from_their_start(A: Tensor, Z: Tensor, iterations: int) -> Tensor:
        found.append(inverse(A, A.mT / A.sum(-2).amax(), iterations))
        return found[0]

    monkeypatch.setattr(nystromformer, "segment_means", means_with_padding)
    monkeypatch.setattr(nystromformer, "inverse", from_their_start)
    mask = g["mask"] > 0
    assert not mask.all()
    given = [g[f"in.{n}"].requires_grad_() for n in "qkv"]
    q, k, v = (t * mask[:, None, :, None] for t in given)
    y = mixer.attend(q, k, v, mask)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], g["mid.pinv"], rtol=0, atol=1e-12)
    for n, grad in zip("qkv", torch.autograd.grad(y, given, g["w"]), strict=True):
        torch.testing.assert_close(grad, g[f"grad.{n}"], rtol=0, atol=1e-11)


def alone(mixer: NystromformerMixer, x: Tensor) -> Tensor:
    """The equations for one sequence without padding, segment by segment: (1, n, D) -> (1, n, D)."""
    n, scale = x.shape[1], (mixer.out.in_features // mixer.n_heads) ** -0.5
    q, k, v = (split_heads(part, mixer.n_heads) for part in mixer.qkv(x).chunk(3, dim=-1))
    edges = [j * n // mixer.landmarks for j in range(mixer.landmarks + 1)]
    cuts = [slice(a, b) for a, b in pairwise(edges) if a < b]
    mark_q, mark_k = (torch.stack([t[:, :, cut].mean(2) for cut in cuts], 2) for t in (q, k))
    one, two, three = ((a @ b.mT * scale).softmax(-1) for a, b in ((q, mark_k), (mark_q, mark_k), (mark_q, k)))
    Z = (
        two.mT
        / torch.linalg.matrix_norm(two, 1)[..., None, None]
        / torch.linalg.matrix_norm(two, torch.inf)[..., None, None]
    )
    eye = torch.eye(len(cuts), dtype=x.dtype)
    for _ in range(mixer.iterations):
        Z = Z @ (13 * eye - two @ Z @ (15 * eye - two @ Z @ (7 * eye - two @ Z))) / 4
    taps, reach = mixer.conv.weight[:, 0, :, 0], mixer.conv.kernel_size[0] // 2
    wide = F.pad(v, (0, 0, reach, reach))
    skip = sum(taps[:, i, None, None] * wide[:, :, i : i + n] for i in range(2 * reach + 1))
    return mixer.out(merge_heads(one @ Z @ (three @ v) + skip))


@pytest.mark.parametrize("lengths", [(24, 17), (19, 3), (6, 1)])
def test_padded_rows_equal_the_equations_on_each_sequence_alone(lengths: tuple[int, ...]) -> None:
    mixer = NystromformerMixer(8, n_heads=2, qkv_dim=8, landmarks=6, kernel=5, iterations=6).double()
    torch.nn.init.normal_(mixer.qkv.bias)
    total = max(lengths) + 1
    mask = torch.arange(total) < torch.tensor(lengths).unsqueeze(1)
    x = (torch.randn(2, total, 8, dtype=torch.float64) * mask.unsqueeze(-1)).requires_grad_()
    w = torch.randn_like(x)
    y = mixer(x, mask)
    for b, n in enumerate(lengths):
        other = alone(mixer, x[b : b + 1, :n])
        torch.testing.assert_close(y[b : b + 1, :n], other, rtol=1e-11, atol=1e-11)
        inputs = (x, *mixer.parameters())
        own_grads = torch.autograd.grad((y[b, :n] * w[b, :n]).sum(), inputs, retain_graph=True)
        for one, two in zip(own_grads, torch.autograd.grad((other[0] * w[b, :n]).sum(), inputs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def test_softmax_attention_where_every_token_is_a_landmark() -> None:
    """Z tends to the inverse: the more steps the closer."""
    torch.manual_seed(0)
    mixer = NystromformerMixer(8, n_heads=2, qkv_dim=8, landmarks=16, kernel=3, iterations=6).double()
    with torch.no_grad():  # keys near their queries: every token looks at itself most, and the matrix inverts well
        mixer.qkv.weight[8:16] = mixer.qkv.weight[:8]
    x, mask = torch.randn(2, 16, 8, dtype=torch.float64) * 2, torch.arange(16) < torch.tensor([[16], [11]])
    q, k, v = (split_heads(part, 2) for part in mixer.qkv(x).chunk(3, dim=-1))
    v = v * mask[:, None, :, None]
    weights = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    exact = mixer.out(merge_heads(weights @ v + mixer.conv(v)))
    errors = []
    for mixer.iterations in (6, 12, 40):
        errors.append((mixer(x, mask) - exact)[mask].abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


def test_segments() -> None:
    """Ten tokens in four segments: 2, 3, 2, 3; three in four: one each, and one empty."""
    x = torch.arange(10.0).repeat(2, 1).unsqueeze(-1)
    means, known = segment_means(x, torch.arange(10) < torch.tensor([[10], [3]]), 4)
    assert means[0, :, 0].tolist() == [0.5, 3, 5.5, 8]
    assert known.tolist() == [[True] * 4, [False, True, True, True]]
    assert means[1, 1:, 0].tolist() == [0, 1, 2]


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
        ({"kernel": 4}, "landmarks 64, iterations 6, kernel 4: each at least 1, and kernel odd"),
        ({"direction": "causal"}, "direction is 'causal'; bidirectional"),
    ):
        with pytest.raises(ValueError, match=said):
            Nystromformer(**shape, **wrong)
