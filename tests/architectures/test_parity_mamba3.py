"""mamba3 against tensors of the authors' block, its recurrence, and what its turning state can count."""

from __future__ import annotations

import math
from typing import Any

import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from stepping import run, stepped
from torch import Tensor

from lra.architectures.state_space.mamba3 import Mamba3, Mamba3Mixer


def mixer_of(**own: Any) -> Mamba3Mixer:
    mixer = Mamba3(**{"d_model": 6, "n_layers": 1, "length": 16, "state_size": 8, "head_dim": 4, **own}).blocks[0].mixer
    assert isinstance(mixer, Mamba3Mixer)
    return mixer.double()


def loaded() -> tuple[Mamba3Mixer, dict[str, Tensor]]:
    g = golden("mamba3")
    mixer = mixer_of(
        state_size=int(g["cfg.d_state"]), head_dim=int(g["cfg.headdim"]), n_groups=int(g["cfg.ngroups"]),
        rope=float(g["cfg.rope_fraction"]),
    )  # fmt: skip
    mixer.load_state_dict({key: stored(g, f"param.{key}") for key in mixer.state_dict()})
    return mixer, g


def stored(g: dict[str, Tensor], key: str) -> Tensor:
    """Biases are stored (head, 1, state) there and (head, state) here."""
    return g[key].squeeze(1) if g[key].dim() == 3 else g[key]


def test_block_equals_that_of_the_authors() -> None:
    mixer, g = loaded()
    x = g["x"].requires_grad_()
    terms = mixer._terms(x)
    assert_near(terms[4].mT, g["mid.dt"], "dt")
    assert_near(terms[5].mT, g["mid.adt"], "dt A")
    y = mixer(x, everything(x))
    assert_near(y, g["y"], "y")
    own = dict(mixer.named_parameters())
    assert_gradients(y, g, x, {key: (parameter, stored(g, f"grad.param.{key}")) for key, parameter in own.items()})


def test_step_equals_the_authors_output_and_last_state() -> None:
    mixer, g = loaded()
    y, (theta, S, _, _) = run(mixer, g["x"])
    assert_near(y, g["y"], "y")
    assert_near(S, g["mid.final_state"], "S")
    turns = (theta - g["mid.final_angle"]) / (2 * math.pi)
    assert_near(turns - turns.round(), torch.zeros_like(turns), "theta")


def test_gradients_equal_the_recurrence_with_two_groups_and_all_of_the_state_turning() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(n_groups=3, rope=1.0)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: stepped(mixer, x))


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    mixer = mixer_of().float()
    x = torch.randn(1, 2048, 6)
    with torch.no_grad():
        assert_near(stepped(mixer, x), mixer(x, everything(x)), "y", 1e-3)


def test_half_a_turn_a_token_counts_modulo_2() -> None:
    """A first token writes to the state; each one that turns by pi flips the sign of what is read later."""
    mixer = mixer_of(state_size=4, rope=1.0)
    flips = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    v = torch.zeros(1, 8, mixer.n_heads, 4, dtype=torch.float64)
    v[:, 0] = 1
    ones = torch.ones(1, 8, mixer.n_heads, dtype=torch.float64)
    theta = (math.pi * flips.cumsum(0)).view(1, 8, 1, 1).expand(1, 8, mixer.n_heads, 2).double()
    key = mixer._turned(torch.ones(1, 8, mixer.n_heads, 4, dtype=torch.float64), theta)
    o = mixer.scan(v, key, key, ones, 0 * ones, ones)
    assert_near(o[0, :, 0, 0] / 4, 1 - 2 * (flips.cumsum(0) % 2).double(), "parity")


test_wrong_arguments_are_named = refuses(Mamba3, d_model=8, n_layers=1, length=8)(
    ({"expand": 0}, "expand is 0"),
    ({"rope": 0.0}, r"rope is 0\.0"),
    ({"state_size": 2}, "state_size is 2"),
    ({"head_dim": 5}, "head_dim is 5"),
    ({"n_groups": 3}, "n_groups is 3"),
    ({"dt_min": 0.2}, r"dt_min is 0\.2"),
)
