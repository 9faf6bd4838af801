"""s5 against tensors of the authors' modules, its recurrence step by step, and the properties of its start."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor, nn

from lra.architectures.state_space.s5 import S5, S5Mixer, hippo_block
from lra.config.sections import Optim
from lra.training.optimisers import parameter_groups
from lra.training.request import Request, resolve

SSMS: dict[str, dict[str, Any]] = {
    "s5_unidirectional": {},
    "s5_bidirectional": {"direction": "bidirectional"},
    "s5_bidirectional_complexC_clip": {"direction": "bidirectional", "discretization": "bilinear", "clip_eigs": True},
    "s5_bilinear_complexC_noconj": {"discretization": "bilinear", "state_size": 32},
}


def encoder_of(**own: Any) -> S5:
    return S5(**{"d_model": 8, "n_layers": 1, "length": 40, "state_size": 16, "n_blocks": 2, **own}).double()


def mixer_of(encoder: S5) -> S5Mixer:
    mixer = encoder.blocks[0].mixer
    assert isinstance(mixer, S5Mixer)
    return mixer


def load(mixer: S5Mixer, g: dict[str, Tensor], prefix: str = "param.", scale: float = 1.0) -> S5Mixer:
    """Copy the parameters of an S5SSM; the gate stays the module's own."""
    if f"{prefix}C1" in g:
        C = torch.stack([g[f"{prefix}C1"], g[f"{prefix}C2"]])
    else:
        C = torch.stack(g[f"{prefix}C"].chunk(len(mixer.C), dim=1))
    state = {
        "Lambda_re": g[f"{prefix}Lambda_re"],
        "Lambda_im": g[f"{prefix}Lambda_im"],
        "B": g[f"{prefix}B"],
        "C": scale * C,
        "D": g[f"{prefix}D"],
        "log_step": g[f"{prefix}log_step"].flatten(),
    }
    missing, unexpected = mixer.load_state_dict(state, strict=False)
    assert missing == ["out2.weight", "out2.bias"]
    assert not unexpected
    return mixer


@pytest.mark.parametrize("name", SSMS)
def test_ssm_equals_the_authors(name: str) -> None:
    g = golden(name)
    # modes stored without conjugates are read by Re, not by 2 Re
    mixer = load(mixer_of(encoder_of(**SSMS[name])), g, scale=0.5 if "noconj" in name else 1.0)
    decay, B = mixer.discrete()
    torch.testing.assert_close(decay, g["mid.Lambda_bar"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(B, g["mid.B_bar"], rtol=1e-12, atol=1e-13)
    x = g["x"].requires_grad_()
    y = mixer.ssm(x)
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", ["half_glu1", "half_glu2"])
def test_residual_layer_equals_the_authors(activation: str) -> None:
    g = golden("s5_layer")
    encoder = encoder_of(direction="bidirectional", activation=activation)
    load(mixer_of(encoder), g, "param.seq.")
    layer = encoder.blocks[0]
    norm = layer.norm
    assert isinstance(norm, nn.LayerNorm)
    norm.eps = 1e-6  # of flax
    state = {
        "norm.weight": g["param.norm.scale"],
        "norm.bias": g["param.norm.bias"],
        "mixer.out2.weight": g["param.out2.kernel"].T,
        "mixer.out2.bias": g["param.out2.bias"],
    }
    assert not layer.load_state_dict(state, strict=False).unexpected_keys
    x = g["x"].requires_grad_()
    y = layer(x, everything(x))
    torch.testing.assert_close(y, g[f"mid.y.{activation}.prenorm"], rtol=1e-11, atol=1e-12)
    if activation == "half_glu1":
        torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
        (y * g["w"]).sum().backward()
        torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


def test_gradients_of_every_parameter_equal_the_recurrence() -> None:
    """The stored tensors hold the gradient of x alone; the recurrence step by step gives those of the parameters."""
    g = golden("s5_unidirectional")
    mixer = load(mixer_of(encoder_of()), g)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    recurrent = torch.autograd.grad((stepped(mixer, g["x"]) * g["w"]).sum(), parameters)
    parallel = torch.autograd.grad((mixer(g["x"], everything(g["x"])) * g["w"]).sum(), parameters)
    for name, own, other in zip(names, parallel, recurrent, strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-10), name


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(encoder_of(d_model=4)).float(), 4, rtol=1e-4, atol=2e-5)


def test_modes_are_those_of_the_authors() -> None:
    g = golden("s5_unidirectional")
    modes, basis = hippo_block(8)
    torch.testing.assert_close(modes, g["mid.init.block_Lambda"][:4], rtol=1e-11, atol=1e-11)
    # an eigenvector is defined up to its phase
    torch.testing.assert_close(basis.abs(), g["mid.init.block_V"][:, :4].abs(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mixer_of(encoder_of()).Lambda_im, g["mid.init.Lambda_im"], rtol=1e-6, atol=0)


def test_modes_diagonalise_the_normal_part_of_hippo() -> None:
    """From the matrix itself: A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; p_n = sqrt(n + 1/2)."""
    n = torch.arange(16, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    hippo = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
    normal = (hippo + torch.outer(root, root) / 2).to(torch.complex128)
    modes, basis = hippo_block(16)
    torch.testing.assert_close(normal @ basis, basis * modes, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(basis.mH @ basis, torch.eye(8, dtype=torch.complex128), rtol=0, atol=1e-12)


def test_scales_and_step_sizes_at_the_start() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(encoder_of(d_model=64, state_size=512, n_blocks=8, dt_min=1e-4, dt_max=0.1))
    # V is unitary: a row of B keeps the variance of B', one of C twice that of each part of C'
    assert abs(mixer.B.square().sum(-1).mean().item() * 512 - 1) < 0.05
    assert abs(mixer.C.square().sum(-1).mean().item() * 512 - 2) < 0.05
    dt = mixer.log_step.exp()
    assert dt.min() >= 1e-4 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    assert 2e-3 < dt.median() < 5e-3  # uniform in the logarithm: the geometric mean, 3.2e-3


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("c_init", "variance"),
    # of a part of C: one of C' for each, whose sum over a unit column of V has twice that in all; then that of C itself
    [("trunc_standard_normal", 1 / 512), ("lecun_normal", 1 / (512 * 64)), ("complex_normal", 1 / 2)],
)
def test_the_three_starts_of_C(c_init: str, variance: float, direction: str) -> None:
    torch.manual_seed(0)
    C = mixer_of(encoder_of(d_model=64, state_size=512, n_blocks=8, c_init=c_init, direction=direction)).C
    assert C.shape == (1 if direction == "causal" else 2, 64, 256, 2)
    for part in C.unbind(-1):
        assert abs(part.square().mean().item() / variance - 1) < 0.05


def test_published_settings_start_C_as_each_script_does() -> None:
    started = {
        task: resolve(Request(task, "s5", "paper"))[0].encoder["c_init"] for task in ("listops", "pathx", "text")
    }
    assert started == {"listops": "lecun_normal", "pathx": "complex_normal", "text": "lecun_normal"}


def test_optimiser_settings_reach_the_ssm_alone() -> None:
    encoder = S5(d_model=8, n_layers=1, length=8, ssm_lr=5e-4)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    assert own == {f"layers.0.mixer.{name}" for name in ("Lambda_re", "Lambda_im", "B", "log_step")}
    assert all(settings == {"lr": 5e-4, "weight_decay": 0.0} for settings in encoder.optim.values())


@pytest.mark.parametrize(
    ("own", "B", "dt"),
    [
        ({}, (5e-4, 0.0), (5e-4, 0.0)),
        ({"opt_config": "BandCdecay"}, (5e-4, 0.07), (5e-4, 0.0)),
        ({"opt_config": "BfastandCdecay"}, (4e-3, 0.07), (5e-4, 0.0)),
        ({"dt_global": True}, (5e-4, 0.0), (4e-3, 0.07)),
    ],
)
def test_optimiser_groups_are_those_of_the_released_configurations(
    own: dict[str, Any], B: tuple[float, float], dt: tuple[float, float]
) -> None:
    """create_train_state in s5/train_helpers.py: rate and weight decay."""
    encoder = S5(d_model=8, n_layers=1, length=8, ssm_lr=5e-4, **own)
    groups = parameter_groups(encoder, encoder, Optim(lr=4e-3, weight_decay=0.07, decay="all"))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    settings = {name: found[id(p)] for name, p in encoder.blocks[0].mixer.named_parameters()}
    assert [settings[name] for name in ("B", "log_step", "Lambda_re")] == [B, dt, (5e-4, 0.0)]
    assert settings["C"] == settings["D"] == (4e-3, 0.07)


test_wrong_arguments_are_named = refuses(S5, d_model=8, n_layers=1, length=8)(
    ({"opt_config": "fast"}, "standard, BandCdecay, BfastandCdecay"),
    ({"state_size": 24}, "state_size is 24"),
    ({"n_blocks": 0}, "state_size is 64"),
    ({"discretization": "euler"}, "zoh, bilinear"),
    ({"activation": "relu"}, "half_glu1, half_glu2"),
    ({"c_init": "normal"}, "trunc_standard_normal, lecun_normal, complex_normal"),
    ({"dt_min": 0.2}, r"dt_min is 0\.2"),
)
