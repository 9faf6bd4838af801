"""megalodon against tensors of the authors' block and of a second source of its averages, and its recurrence."""

from __future__ import annotations

from typing import Any

import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from stepping import stepped

from lra.architectures.attention.megalodon import ComplexEMA, Megalodon, MegalodonMixer

RENAMED = {"rmsnorm_weight": "rmsnorm.weight"}


def mixer_of(**own: Any) -> MegalodonMixer:
    shape = {"d_model": 6, "n_layers": 1, "length": 12, "z_dim": 4, "value_dim": 8, "averages": 3, "n_heads": 2}
    mixer = Megalodon(**{**shape, "chunk": 4, "norm_groups": 3, **own}).blocks[0].mixer
    assert isinstance(mixer, MegalodonMixer)
    return mixer.double()


def test_block_equals_that_of_the_authors() -> None:
    g = golden("megalodon_block")
    mixer = mixer_of(chunk=int(g["cfg.chunk_size"]), n_heads=int(g["cfg.heads"]), norm_groups=int(g["cfg.norm_groups"]))
    own = {key: parameter for key, parameter in mixer.named_parameters() if not key.startswith(("fc", "ffn"))}
    stored = {key: f"param.{RENAMED.get(key, key)}" for key in own}
    assert sorted(stored.values()) == sorted(key for key in g if key.startswith("param."))
    mixer.load_state_dict({key: g[name] for key, name in stored.items()}, strict=False)
    x = g["x"].requires_grad_()
    n, _ = mixer.timenorm(x)
    assert_near(n, g["mid.timenorm"], "timestep norm")
    c = mixer.cema(n)
    assert_near(c, g["mid.cema"], "averages")
    assert_near(mixer.attention(*mixer._views(n, c)[1:]), g["mid.attention"], "attention")
    y = mixer.attend(x)
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, {key: (own[key], g[f"grad.{name}"]) for key, name in stored.items()})


def test_averages_equal_a_second_implementation() -> None:
    g = golden("megalodon_cema")
    cema = ComplexEMA(6, 4).double()
    state = {key: g[f"param.{key}"] for key in ("alpha", "delta", "theta")}
    state["gamma"] = torch.stack([g["param.gamma_real"], g["param.gamma_imag"]], dim=-1)
    state["omega"] = g["param.omega"].unsqueeze(1)
    cema.load_state_dict(state)
    assert_near(cema.kernel(16), g["mid.kernel"], "kernel")
    x = g["x"].mT.contiguous().requires_grad_()
    y = cema(x)
    assert_near(y.mT, g["mid.y_authors"], "y of the authors")
    assert_near(y.mT, g["y"], "y")
    (y * g["w"].mT).sum().backward()
    assert x.grad is not None
    assert cema.gamma.grad is not None
    assert_near(x.grad.mT, g["grad.x"], "grad.x")
    for key in ("alpha", "delta", "theta"):
        assert_near(cema.get_parameter(key).grad, g[f"grad.param.{key}"], key)
    assert cema.omega.grad is not None
    assert_near(cema.omega.grad.squeeze(1), g["grad.param.omega"], "omega")
    for part, key in enumerate(("gamma_real", "gamma_imag")):
        assert_near(cema.gamma.grad[..., part], g[f"grad.param.{key}"], key)


def test_gradients_equal_the_recurrence_over_three_chunks() -> None:
    torch.manual_seed(0)
    mixer = mixer_of()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: stepped(mixer, x))


def test_rotary_positions_turn_neighbours_and_start_anew_in_each_chunk() -> None:
    """The stored heads have one pair of features; of two pairs each is a complex number that turns at its own rate."""
    torch.manual_seed(0)
    mixer = mixer_of(n_heads=1, chunk=5)
    q, k, v = (torch.randn(1, 8, size, dtype=torch.float64) for size in (4, 4, 8))
    rate = torch.tensor([1.0, 0.01], dtype=torch.float64)
    expected = []
    for start, stop in ((0, 5), (5, 8)):
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(stop - start).unsqueeze(1) * rate)
        turned = [torch.view_as_complex(t[0, start:stop].unflatten(-1, (2, 2))) * turn for t in (q, k)]
        scores = (turned[0] @ turned[1].mH).real
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        expected.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[0, start:stop])
    assert_near(mixer.attention(q, k, v)[0], torch.cat(expected), "attention")


def test_the_norm_knows_the_tokens_so_far_alone() -> None:
    """At each token the statistics are those of torch over the group's channels of all tokens up to it."""
    norm = mixer_of().timenorm
    x = 3 + 2 * torch.randn(2, 9, 6, dtype=torch.float64)
    n, _ = norm(x)
    for t in range(9):
        past = x[:, : t + 1].unflatten(-1, (3, 2)).transpose(1, 2).flatten(2)  # (B, G, tokens and channels)
        variance, mean = torch.var_mean(past, dim=-1, correction=0)
        expected = (x[:, t].unflatten(-1, (3, 2)) - mean.unsqueeze(-1)) / (variance + 1e-5).sqrt().unsqueeze(-1)
        assert_near(n[:, t], expected.flatten(1), f"token {t}")


def test_the_feed_forward_part_hops_over_the_attention() -> None:
    """Without it the layer is the identity, whatever the attention."""
    encoder = Megalodon(d_model=6, n_layers=1, length=12, z_dim=4).double().eval()
    mixer = encoder.blocks[0].mixer
    assert isinstance(mixer, MegalodonMixer)
    torch.nn.init.zeros_(mixer.fc2.weight)
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    assert_near(encoder.blocks[0](x, everything(x)), x, "layer")


test_wrong_arguments_are_named = refuses(Megalodon, d_model=8, n_layers=1, length=8)(
    ({"z_dim": 6, "n_heads": 2}, "z_dim is 6"),
    ({"value_dim": 7, "n_heads": 2}, "value_dim is 7"),
    ({"norm_groups": 8}, "norm_groups is 8"),
    ({"chunk": 0}, "chunk is 0"),
    ({"block": {"ffn": "gelu"}}, "block.ffn is 'gelu'"),
    ({"block": {"prenorm": False}}, "block.prenorm is false"),
)
