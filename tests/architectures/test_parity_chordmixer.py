"""chordmixer against tensors of the authors' encoder, a loop over rings of several lengths, and what an output sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.convolution.chordmixer import ChordMixer, Turn, turned


def load(encoder: ChordMixer, g: dict[str, Tensor]) -> ChordMixer:
    names = {"prenorm": "prenorm", "fc1": "mix.fc1", "fc2": "mix.fc2", "norm": "norm"}
    encoder.blocks.load_state_dict(
        {
            f"{i}.{own}.{kind}": g[f"param.encoder.chordmixer_blocks.{i}.{other}.{kind}"]
            for i in range(len(encoder.blocks))
            for own, other in names.items()
            for kind in ("weight", "bias")
        }
    )
    return encoder


def test_encoder_equals_the_authors() -> None:
    g = golden("chordmixer")
    own: dict[str, Any] = {"length": int(g["cfg.max_seq_len"]), "track_size": int(g["cfg.track_size"]), "hidden": 7}
    encoder = load(ChordMixer(d_model=10, n_layers=1, **own).double(), g)
    assert len(encoder.blocks) == 4
    assert not [name for name, _ in encoder.named_parameters() if not name.startswith("blocks.")]
    x = g["x"].clone().requires_grad_()
    embedded = F.linear(x, g["param.embedding.weight"], g["param.embedding.bias"])
    y = encoder(embedded, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    logits = F.linear(y.mean(1), g["param.decoder.decoder.weight"], g["param.decoder.decoder.bias"])
    torch.testing.assert_close(logits, g["mid.logits"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


def test_a_map_leads_into_the_tracks_and_out() -> None:
    """The authors' embedding is the map in, where d_model is that of their input."""
    g = golden("chordmixer")
    encoder = load(ChordMixer(d_model=3, n_layers=1, length=16, track_size=2, hidden=7).double(), g)
    encoder.embedding.load_state_dict({kind: g[f"param.embedding.{kind}"] for kind in ("weight", "bias")})
    y = encoder.out(g["y"])
    torch.testing.assert_close(encoder(g["x"], everything(g["x"])), y, rtol=1e-12, atol=1e-12)


def test_rotation_alone_equals_the_authors() -> None:
    g = golden("chordmixer")
    x = g["mid.embedded"]
    shifts = torch.tensor([0, 1, 2, 4, 8])
    orders = (turned(everything(x), by) for by in (shifts, -shifts))
    assert torch.equal(Turn.apply(x.reshape(-1, 2), *orders).view(x.shape), g["mid.rotated_embedding"])


def rolled(encoder: ChordMixer, x: Tensor, size: int) -> Tensor:
    """One sequence without padding, (L, D), by the equations: each track is rolled with torch.roll."""
    x = encoder.embedding(x)
    for block in encoder.blocks:
        h = block.fc1(block.prenorm(x))
        h = block.fc2(0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
        tracks = [h[:, i : i + size] for i in range(0, h.shape[1], size)]
        turns = [tracks[0], *(torch.roll(track, -(2**i), 0) for i, track in enumerate(tracks[1:]))]
        x = block.norm(x + torch.cat(turns, -1))
    return encoder.out(x)


@pytest.mark.parametrize(("d_model", "kind"), [(10, "layer"), (7, "layer"), (10, "none")])
def test_rings_of_several_lengths_equal_a_loop(d_model: int, kind: str) -> None:
    """Each row is a ring of its own length, also where a track goes around it more than once."""
    torch.manual_seed(0)
    encoder = ChordMixer(d_model=d_model, n_layers=2, length=9, track_size=2, prenorm=kind, norm=kind).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 9, d_model, dtype=torch.float64, requires_grad=True)
    lengths = [9, 5, 3, 1]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    w = torch.randn_like(x) * mask.unsqueeze(-1)
    rows = [F.pad(rolled(encoder, row[:n], 2), (0, 0, 0, 9 - n)) for row, n in zip(x, lengths, strict=True)]
    y, expected = encoder(x, mask).masked_fill(~mask.unsqueeze(-1), 0), torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    names, inputs = zip(("x", x), *encoder.named_parameters(), strict=True)
    ours, others = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, expected))
    for name, own, other in zip(names, ours, others, strict=True):
        assert torch.allclose(own, other, rtol=1e-10, atol=1e-11), name


@pytest.mark.parametrize("length", [64, 33, 50])
def test_an_output_sees_sums_of_as_many_powers_of_two_as_blocks(length: int) -> None:
    at, reached = length // 3, {0}
    for blocks in range(1, 7):
        torch.manual_seed(0)
        own: dict[str, Any] = {"length": length, "prenorm": "none", "norm": "none", "blocks": blocks}
        encoder = ChordMixer(d_model=14, n_layers=1, **own).double()
        x = torch.randn(1, length, 14, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(encoder(x, everything(x))[0, at].sum(), x)
        reached |= {distance + power for distance in reached for power in (1, 2, 4, 8, 16, 32)}
        seen = grad[0].abs().sum(-1).nonzero().flatten().tolist()
        assert set(seen) == {(at + distance) % length for distance in reached}
    assert len(ChordMixer(d_model=14, n_layers=1, length=length).blocks) == blocks
    assert len(seen) == length


def test_turning_the_ring_turns_the_output() -> None:
    torch.manual_seed(0)
    encoder = ChordMixer(d_model=12, n_layers=1, length=21).double()
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    y = encoder(x, everything(x))
    torch.testing.assert_close(encoder(x.roll(5, 1), everything(x)), y.roll(5, 1), rtol=1e-12, atol=1e-12)


def test_shape_follows_length() -> None:
    """ceil(log2 length) blocks and one track more: as many features as fit d_model, or as track_size asks for."""
    for length, powers in [(1, 0), (2, 1), (16, 4), (17, 5), (1024, 10)]:
        encoder = ChordMixer(d_model=64, n_layers=1, length=length)
        assert encoder.shifts.tolist() == [0, *(2**i for i in range(powers))]
        assert len(encoder.blocks) == max(1, powers)
        width = encoder.blocks[0].fc2.out_features
        assert width % (powers + 1) == 0
        assert 64 - powers - 1 < width <= 64
    narrow = ChordMixer(d_model=4, n_layers=12, length=1024)
    assert narrow.blocks[0].fc2.out_features == 11
    assert len(narrow.blocks) == 12
    wide = ChordMixer(d_model=4, n_layers=1, length=1024, track_size=28, hidden=420)
    assert wide.blocks[0].fc1.weight.shape == (420, 308)


def test_start_is_xavier_without_biases() -> None:
    torch.manual_seed(0)
    encoder = ChordMixer(d_model=100, n_layers=1, length=16, track_size=24, hidden=200)
    for layer in ("embedding", "blocks.0.fc1", "blocks.3.fc2", "out"):
        weight = encoder.get_parameter(f"{layer}.weight")
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert not encoder.get_parameter(f"{layer}.bias").any()


def test_batch_norm_learns_from_real_tokens_alone() -> None:
    torch.manual_seed(0)
    encoder = ChordMixer(d_model=10, n_layers=1, length=16, prenorm="batch", norm="batch").double()
    x, mask = torch.randn(2, 16, 10, dtype=torch.float64), torch.arange(16) < torch.tensor([[16], [5]])
    encoder(x, mask)
    real = x[mask]
    torch.testing.assert_close(encoder.blocks[0].prenorm.running_mean, 0.1 * real.mean(0), rtol=1e-12, atol=1e-12)
    filled = torch.where(mask.unsqueeze(-1), x, 9.0)
    torch.testing.assert_close(encoder(filled, mask)[mask], encoder(x, mask)[mask], rtol=1e-12, atol=1e-12)


test_wrong_arguments_are_named = refuses(ChordMixer, d_model=8, n_layers=1, length=8)(
    ({"track_size": 0}, "track_size is 0"),
    ({"hidden": 0}, "hidden is 0"),
    ({"blocks": 0}, "blocks is 0"),
    ({"norm": "group"}, "norm is 'group'; one of layer, batch, none"),
    ({"prenorm": "rms"}, "prenorm is 'rms'"),
    ({"direction": "causal"}, "direction is 'causal'"),
)
