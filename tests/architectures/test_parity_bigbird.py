"""bigbird against Hugging Face's block-sparse layer and the dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import assert_dense, distances, real_prefixes
from golden_tensors import golden
from refusals import refuses

from lra.architectures.attention.bigbird import BigBird, BigBirdMixer, drawn
from lra.conformance.suite import check

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "length": 40, "size": 4}


def test_equals_hugging_face() -> None:
    """The row of their batch that ends without padding: their last global block is that of the padded sequence."""
    g = golden("bigbird_block_sparse")
    heads, width, length = int(g["cfg.H"]), g["x"].shape[2], g["x"].shape[1]
    mixer = BigBirdMixer(
        width,
        n_heads=heads,
        width=width,
        positions="none",
        causal=False,
        size=int(g["cfg.block"]),
        n_random=int(g["cfg.r"]),
        length=length,
    ).double()
    mixer.random_blocks[:, 1:-1] = g["mid.rand_blocks"].long()
    for kind in ("weight", "bias"):
        parts = [g[f"param.{part}.{kind}"] for part in ("query", "key", "value")]
        mixer.qkv.load_state_dict({kind: torch.cat(parts)}, strict=False)
    torch.nn.init.eye_(mixer.out.weight)
    torch.nn.init.zeros_(mixer.out.bias)
    full = (g["mask"] > 0).all(1)
    assert full.any()
    x, mask = g["x"][full].requires_grad_(), g["mask"][full] > 0
    y = mixer(x, mask)
    torch.testing.assert_close(y, g["y"][full], rtol=0, atol=1e-11)
    (y * g["w"][full]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"][full], rtol=0, atol=1e-11)


@pytest.mark.parametrize("positions", ["none", "rope", "alibi"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_dense_definition(positions: str, causal: bool) -> None:
    torch.manual_seed(0)
    lengths, total, size = (38, 22, 5), 38, 4
    mixer = BigBirdMixer(16, n_heads=4, width=16, positions=positions, causal=causal, size=size, n_random=2, length=44)
    block = torch.arange(total) // size
    apart = (block - block[:, None]).abs()
    sees = (apart <= 1) | (block == 0) | (mixer.random_blocks[:, block, :, None] == block).any(2)
    sees = sees.expand(3, -1, -1, -1)
    if not causal:
        last = block == (torch.tensor(lengths)[:, None] - 1) // size
        ends = (last | (block == 0))[:, None]
        sees = sees | ends[:, :, None] | ends[..., None]
    else:
        sees = sees & (distances(total) <= 0)
    assert_dense(mixer, sees, real_prefixes(*lengths))


@pytest.mark.parametrize("causal", [False, True])
def test_random_blocks_are_distinct_and_elsewhere(causal: bool) -> None:
    torch.manual_seed(0)
    chosen = drawn(3, 12, 4, causal)
    for row, blocks in enumerate(chosen.transpose(0, 1).tolist()):
        allowed = {b for b in range(1, row if causal else 11) if abs(b - row) > 1}
        if not causal and row in (0, 11):
            allowed = set()
        for some in blocks:
            named = [b for b in some if b >= 0]
            assert len(named) == len(set(named)) == min(4, len(allowed))
            assert set(named) <= allowed
    counts = torch.stack([drawn(1, 12, 1, False) for _ in range(2000)])[:, 0, 5, 0].bincount(minlength=12)
    # rows draw from 1, 2, 3, 7, 8, 9, 10 alike: 2000 / 7 each, five standard deviations
    assert (counts[[1, 2, 3, 7, 8, 9, 10]] - 2000 / 7).abs().max() < 5 * (2000 / 7 * 6 / 7) ** 0.5


def test_random_blocks_are_saved_and_differ_between_layers() -> None:
    torch.manual_seed(0)
    one = BigBird(**SMALL)
    names = [name for name in one.state_dict() if name.endswith("random_blocks")]
    assert len(names) == 2
    assert not torch.equal(*(one.state_dict()[name] for name in names))
    torch.manual_seed(1)
    two = BigBird(**SMALL)
    x, mask = torch.randn(1, 40, 16), torch.ones(1, 40, dtype=torch.bool)
    assert not torch.equal(two(x, mask), one(x, mask))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x, mask), one(x, mask))


def test_with_small_blocks_it_is_a_sound_encoder() -> None:
    only = ["padding", "padding_length", "batch", "gradients", "causal", "step", "cost", "seed"]
    for options in ({"size": 4}, {"size": 8, "n_random": 0, "positions": "alibi"}):
        assert not [f.message for f in check("bigbird", only=only, options=options) if f.failed]


test_wrong_arguments_are_named = refuses(BigBird, **SMALL)(
    ({"size": 0}, "size is 0"),
    ({"n_random": -1}, "n_random is -1"),
)
