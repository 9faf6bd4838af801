"""Batch norm over real tokens: PyTorch's on them, blind to padding, and to the rest of the batch when evaluated."""

from __future__ import annotations

import torch

from lra.architectures._norm import BatchNorm
from lra.registry import architectures


def test_equals_torch_on_the_real_tokens() -> None:
    torch.manual_seed(0)
    own, theirs = BatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    with torch.no_grad():
        for a, b in zip(own.parameters(), theirs.parameters(), strict=True):
            b.copy_(torch.nn.init.normal_(a))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    for _ in range(3):
        x = torch.randn(2, 7, 5, dtype=torch.float64) * 3 + 1
        y, expected = own(x.requires_grad_(), mask)[mask], theirs(x[mask])
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
        w = torch.randn_like(y)
        grads = [
            torch.autograd.grad((out * w).sum(), (x, *norm.parameters()))
            for out, norm in ((y, own), (expected, theirs))
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(own.running_mean, theirs.running_mean)
    torch.testing.assert_close(own.running_var, theirs.running_var)
    own.eval(), theirs.eval()
    torch.testing.assert_close(own(x)[mask], theirs(x[mask]), rtol=1e-11, atol=1e-12)


def test_an_encoder_of_it_ignores_padding_and_evaluates_each_sequence_alone() -> None:
    torch.manual_seed(0)
    build = architectures.get("s5")
    encoder = build(d_model=8, n_layers=2, length=16, state_size=16, n_blocks=1, block={"norm": "batch"}).double()
    x, mask = torch.randn(3, 16, 8, dtype=torch.float64), torch.arange(16) < torch.tensor([[16], [9], [4]])
    other = torch.where(mask.unsqueeze(-1), x, 100.0)
    torch.testing.assert_close(encoder(x, mask)[mask], encoder(other, mask)[mask])
    assert encoder.blocks[0].norm.running_mean.any()
    # the statistics of training are the batch's
    assert not torch.allclose(encoder(x, mask)[:1], encoder(x[:1], mask[:1]))
    encoder.eval()
    torch.testing.assert_close(encoder(x, mask)[1:2, :9], encoder(x[1:2, :9], mask[1:2, :9]))
    state = encoder.init_state(1)
    y, _ = encoder.step(x[:1, 0], state)
    torch.testing.assert_close(y, encoder(x, mask)[:1, 0])
