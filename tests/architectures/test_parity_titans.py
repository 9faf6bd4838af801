"""titans against tensors of the package titans-pytorch, and training of the memory with PyTorch's own derivatives."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_close, assert_near, everything, golden
from stepping import run
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.memory.titans import TitansMixer

MEMORY = {"gain": 0, "W": 1, "V": 2}


def stored_name(name: str) -> str:
    if name in MEMORY:
        return f"memory_model_parameters.{MEMORY[name]}"
    module, _, part = name.rpartition(".")
    return f"{module}.0.{part}" if module in ("to_adaptive_step", "to_momentum", "to_decay_factor") else name


def loaded(g: dict[str, Tensor]) -> TitansMixer:
    hidden = g["param.memory_model_parameters.1"].shape[-1]
    chunk, max_lr = int(g["cfg.chunk_size"]), float(g["cfg.max_lr"])
    mixer = TitansMixer(g["x"].shape[-1], hidden, chunk=chunk, max_lr=max_lr, frozen=True).double()
    for norm in (mixer.store_norm, mixer.retrieve_norm):
        norm.epsilon = torch.finfo(torch.float64).eps
    shapes = {name: p.shape for name, p in mixer.named_parameters()}
    mixer.load_state_dict({name: g[f"param.{stored_name(name)}"].reshape(shapes[name]) for name in shapes})
    return mixer


def test_frozen_memory_equals_the_package() -> None:
    g = golden("titans_memory")
    mixer, x = loaded(g), g["x"].requires_grad_()
    y = mixer(x, everything(x))
    assert_close(y, g["y"], 1e-10)
    (y * g["w"]).sum().backward()
    assert_near(x.grad, g["grad.x"], "grad.x")
    for name, parameter in mixer.named_parameters():
        assert_near(parameter.grad, g[f"grad.param.{stored_name(name)}"].reshape(parameter.shape), name)


def test_last_memory_equals_the_package() -> None:
    g = golden("titans_memory")
    y, state = run(loaded(g), g["x"])
    assert_close(y, g["y"], 1e-10)
    names = ("mid.last_norm.gamma", "mid.last_weights.0", "mid.last_weights.1")
    for tensor, name in zip(state[1:4], names, strict=True):
        assert_close(tensor.reshape(g[name].shape), g[name], 1e-10)


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_trained_by_the_derivatives_of_its_loss(frozen: bool) -> None:
    """Token by token, one sequence, with a chunk that is never full."""
    torch.manual_seed(0)
    mixer, x = TitansMixer(4, 6, chunk=3, max_lr=0.7, frozen=frozen).double(), torch.randn(1, 8, 4).double()
    start = [p.detach().clone().requires_grad_() for p in (mixer.gain, mixer.W, mixer.V)]
    memory, momentum = start, [torch.zeros_like(p) for p in start]

    def answer(memory: list[Tensor], z: Tensor) -> Tensor:
        return (1 + memory[0]) * F.layer_norm(F.gelu(z @ memory[1]) @ memory[2], (4,)) + z

    s = F.rms_norm(x[0], (4,), mixer.store_norm.weight, mixer.store_norm.epsilon)
    q = mixer.to_queries(F.rms_norm(x[0], (4,), mixer.retrieve_norm.weight, mixer.store_norm.epsilon))
    expected = []
    for t in range(8):
        if t % 3 == 2:
            chunk = s[t - 2 : t + 1]
            at = start if frozen else memory
            errors = (answer(at, mixer.to_keys(chunk)) - mixer.to_values(chunk)).square().mean(-1)
            loss = (0.7 * mixer.to_adaptive_step(chunk).sigmoid()[:, 0] * errors).sum()
            keep, forget = (g(chunk.mean(0)).sigmoid() for g in (mixer.to_momentum, mixer.to_decay_factor))
            momentum = [keep * S - G for S, G in zip(momentum, torch.autograd.grad(loss, at), strict=True)]
            memory = [((1 - forget) * M + S).detach().requires_grad_() for M, S in zip(memory, momentum, strict=True)]
        expected.append(answer(memory, q[t]))
    assert_close(mixer(x, everything(x))[0], torch.stack(expected).squeeze(1), 1e-12)
