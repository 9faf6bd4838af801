"""deltaproduct against tensors of the authors' layer and recurrence, and what its reflections can do."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_close, assert_layer_as_stored, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor

from lra.architectures._delta import advance
from lra.architectures.linear_attention.deltaproduct import DeltaProduct, DeltaProductMixer


def loaded(g: dict[str, Tensor], gated: bool) -> DeltaProductMixer:
    heads, steps, width = int(g["cfg.heads"]), int(g["cfg.num_householder"]), g["x"].shape[-1]
    keys, values = len(g["param.q_proj.weight"]), len(g["param.g_proj.weight"])
    mixer = DeltaProductMixer(
        width, n_heads=heads, key_dim=keys, value_dim=values, d_conv=4, n_steps=steps, gated=gated
    ).double()
    mixer.load_state_dict({name: g[f"param.{name}"] for name, _ in mixer.named_parameters()})
    return mixer


def test_layer_equals_the_authors() -> None:
    g = golden("gated_deltaproduct_layer")
    assert_layer_as_stored(loaded(g, True), g)


def test_layer_without_forget_gate_equals_the_authors() -> None:
    g = golden("gated_deltaproduct_layer")
    mixer = loaded(g, False)
    assert_close(mixer(g["x"], everything(g["x"])), g["mid.y_nogate"], 1e-12)
    assert_close(run(mixer, g["x"])[0], g["mid.y_nogate"], 1e-12)


def test_step_equals_the_authors() -> None:
    g = golden("gated_deltaproduct_layer")
    y, state = run(loaded(g, True), g["x"])
    assert_close(y, g["y"], 1e-12)
    assert_close(state[3], g["mid.final_state"], 1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_recurrence_from_a_state_equals_the_authors(gated: bool) -> None:
    """They do not scale the query; gradients are stored without the decay."""
    g = golden("deltaproduct")
    steps = int(g["cfg.num_householder"])
    names = ("q", "k", "v", "beta", "initial_state")
    inputs = [g[f"in.{name}"].requires_grad_() for name in names]
    q, k, v, beta, S = inputs
    outputs = []
    for t in range(q.shape[1]):
        o = q[:, t]
        for j in range(steps * t, steps * (t + 1)):
            decay = g["cfg.g"][:, t] if gated and j == steps * t else None
            o, S = advance(q[:, t], k[:, j], v[:, j], beta[:, j], decay, S, 1.0)
        outputs.append(o)
    y = torch.stack(outputs, 1)
    assert_close(y, g["mid.y_gated" if gated else "y"], 1e-12)
    assert_close(S, g["mid.final_state_gated" if gated else "mid.final_state"], 1e-12)
    if not gated:
        for name, grad in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
            assert_close(grad, g[f"grad.{name}"], name=name)


def test_two_steps_turn_a_state_by_any_angle_and_one_cannot() -> None:
    """The product of two reflections at an angle of a half turns by the angle; a reflection has determinant -1."""
    eye = torch.eye(2, dtype=torch.float64)
    for angle in (0.3, 1.2, 2.9):
        a, b = (torch.tensor([t.cos(), t.sin()]) for t in torch.tensor([0.1, 0.1 + angle / 2], dtype=torch.float64))
        S = eye.view(1, 1, 2, 2)
        for key in (a, b):
            beta, zeros = torch.full((1, 1), 2.0, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64)
            _, S = advance(zeros, key.view(1, 1, 2), zeros, beta, None, S)
        turn = torch.tensor(angle, dtype=torch.float64)
        wanted = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
        torch.testing.assert_close(S[0, 0], wanted)


test_wrong_arguments_are_named = refuses(DeltaProduct, d_model=8, n_layers=1, length=8)(
    ({"n_steps": 0}, "n_steps is 0; at least 1"),
    ({"n_heads": 3}, r"expand_k is 1\.0; times d_model, 8, it is a multiple of n_heads, 3"),
    ({"expand_v": 0.3}, r"expand_v is 0\.3"),
)
