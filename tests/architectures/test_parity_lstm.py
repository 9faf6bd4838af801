"""lstm against torch.nn and closed forms of its variants, its recurrent mode, and the properties of its start."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import everything, golden
from stepping import assert_steps_equal_forward, run, stepped

from lra.architectures.recurrent.lstm import LSTM, LSTMMixer


def test_plain_cell_equals_torch() -> None:
    torch.manual_seed(0)
    mixer, theirs = (
        LSTMMixer(5, peephole=False, coupled=False, horizon=20, forget_bias=None).double(),
        torch.nn.LSTM(5, 5, batch_first=True).double(),
    )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    own = [mixer.input.weight, mixer.U, mixer.input.bias]
    with torch.no_grad():
        w, u, b, c = theirs.parameters()
        for parameter, value in zip((w, u, b), own, strict=True):
            parameter.copy_(value)
        c.zero_()
    x = torch.randn(2, 13, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    y, expected = mixer(x, everything(x)), theirs(x)[0]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((y * weight).sum(), (x, *own))
    others = torch.autograd.grad((expected * weight).sum(), (x, w, u, b))
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "peephole", "coupled"),
    [("lstm_peephole", True, False), ("lstm_cifg", False, True), ("lstm_cifg_peephole", True, True)],
)
def test_variants_equal_closed_forms(name: str, peephole: bool, coupled: bool) -> None:
    """The stored layers take 4 features to 5 units; the missing one becomes a feature that is always zero."""
    g = golden(name)
    mixer = LSTMMixer(5, peephole=peephole, coupled=coupled, horizon=20, forget_bias=None).double()
    state = {
        "input.weight": torch.nn.functional.pad(g["param.W"], (0, 1)),
        "U": g["param.R"],
        "input.bias": g["param.b"],
    }
    if peephole:
        state["p"] = torch.stack([g[f"param.{p}"] for p in ("p_i", "p_f", "p_o") if f"param.{p}" in g])
    mixer.load_state_dict(state)
    x = torch.nn.functional.pad(g["x"], (0, 1)).requires_grad_()
    # they start from a state of their own, as the recurrent mode alone can
    y, (_, c) = run(mixer, x, (g["h0"], g["c0"]))
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(c, g["c_n"], rtol=1e-11, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad[..., :4], g["grad.x"], rtol=1e-10, atol=1e-11)


def test_layernorm_equals_haste() -> None:
    """The stored layer takes 4 features to 5 units, as above; its gates are in the order i, g, f, o."""
    g = golden("lstm_layernorm_haste")

    def ours(gates: torch.Tensor) -> torch.Tensor:
        i, candidate, f, o = gates.chunk(4, dim=-1)
        return torch.cat([i, f, candidate, o], dim=-1)

    mixer = LSTMMixer(5, peephole=False, coupled=False, horizon=20, forget_bias=None, layernorm=True).double()
    state = {
        "input.weight": torch.nn.functional.pad(ours(g["param.kernel"]).T, (0, 1)),
        "input.bias": ours(g["param.bias"]),
        "U": ours(g["param.recurrent_kernel"]).T,
        "gain": ours(g["param.gamma"][0]),
        "norm": torch.cat([ours(g["param.gamma"][1]), g["param.gamma_h"], g["param.beta_h"]]).view(6, 5),
    }
    mixer.load_state_dict(state)
    x = torch.nn.functional.pad(g["x"], (0, 1)).requires_grad_()
    y, (_, c) = run(mixer, x, (g["h0"], g["c0"]))
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(c, g["c_n"], rtol=1e-11, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad[..., :4], g["grad.x"], rtol=1e-10, atol=1e-11)


def test_layernorm_carried_equals_torchscript() -> None:
    """The stored layer takes 4 features to 5 units; its two biases act as their sum."""
    g = golden("lstm_layernorm_torchscript")
    mixer = LSTMMixer(5, peephole=False, coupled=False, horizon=20, forget_bias=None, layernorm=True, carried=True)
    mixer.double().load_state_dict({
        "input.weight": torch.nn.functional.pad(g["param.weight_ih"], (0, 1)),
        "input.bias": g["param.layernorm_i.bias"] + g["param.layernorm_h.bias"],
        "U": g["param.weight_hh"],
        "gain": g["param.layernorm_i.weight"],
        "norm": torch.cat([
            g[f"param.layernorm_{part}"] for part in ("h.weight", "c.weight", "c.bias")
        ]).view(6, 5),
    })  # fmt: skip
    x = torch.nn.functional.pad(g["x"], (0, 1)).requires_grad_()
    y, (_, c) = run(mixer, x, (g["h0"], g["c0"]))
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(c, g["c_n"], rtol=1e-11, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad[..., :4], g["grad.x"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("peephole", "coupled", "layernorm"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (False, False, True)],
)
def test_gradients_of_every_parameter_equal_the_recurrence(peephole: bool, coupled: bool, layernorm: bool) -> None:
    torch.manual_seed(0)
    mixer = LSTMMixer(5, peephole=peephole, coupled=coupled, horizon=20, forget_bias=None, layernorm=layernorm).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)
    y, expected = mixer(x, everything(x)), stepped(mixer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, *mixer.parameters())
    ours, others = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, expected))
    for own, other in zip(ours, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(LSTMMixer(8, peephole=True, coupled=False, horizon=2048, forget_bias=None), 8)


def test_gates_start_with_memories_up_to_the_horizon() -> None:
    torch.manual_seed(0)
    mixer = LSTMMixer(64, peephole=True, coupled=False, horizon=1000, forget_bias=None)
    for gate in mixer.U.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=0, atol=1e-5)
    i, f, g, o = mixer.input.bias.chunk(4)
    torch.testing.assert_close(i, -f)
    assert not g.any()
    assert not o.any()
    memories = 1 + f.exp()  # tokens after which a gate of sigmoid(b_f) has forgotten 1 - 1/e, to first order
    assert memories.min() >= 2
    assert memories.max() <= 1000
    assert 350 < memories.mean() < 650
    assert mixer.p is not None
    assert not mixer.p.any()


def test_layernorm_takes_no_other_variant() -> None:
    with pytest.raises(ValueError, match="leave out peephole"):
        LSTM(d_model=4, n_layers=1, length=8, layernorm=True, peephole=True)


def test_a_given_forget_bias_is_used() -> None:
    i, f, g, o = LSTMMixer(4, peephole=False, coupled=False, horizon=1000, forget_bias=1.0).input.bias.chunk(4)
    assert (f == 1).all()
    assert not torch.cat([i, g, o]).any()
    i, g, o = LSTMMixer(4, peephole=False, coupled=True, horizon=1000, forget_bias=1.0).input.bias.chunk(3)
    assert (i == -1).all()
    assert not torch.cat([g, o]).any()
