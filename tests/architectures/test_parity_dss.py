"""dss against tensors of the authors' module, the dense softmax, its recurrence, and the properties of its start."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor

from lra.architectures.state_space.dss import DSS, DSSMixer
from lra.config.sections import Optim
from lra.training.optimisers import parameter_groups


def mixer_of(**own: Any) -> DSSMixer:
    mixer = DSS(**{"d_model": 4, "n_layers": 1, "length": 64, "state_size": 6, **own}).layers[0].mixer
    assert isinstance(mixer, DSSMixer)
    return mixer.double()


def load(mixer: DSSMixer, g: dict[str, Tensor], head: int = 0) -> DSSMixer:
    """One head of a DSS; the heads of its output map lie side by side."""
    if mixer.version == "softmax":
        re, im = g["param.Lambda"].real, g["param.Lambda"].imag
    else:
        re, im = g["param.Lambda_log_neg_re"], g["param.Lambda_im"]
    heads, width = g["param.D"].shape
    state = {
        "log_dt": g["param.log_dt"].reshape(width, -1),
        "Lambda_re": re,
        "Lambda_im": im,
        "W": torch.view_as_real(g["param.W"][head::heads]),
        "D": g["param.D"][head],
        "output_linear.weight": g["param.out.weight"][:, head * width : (head + 1) * width],
        "output_linear.bias": g["param.out.bias"] * (head == 0),
    }
    mixer.load_state_dict(state)
    return mixer


def signed(**own: Any) -> DSSMixer:
    """Every parameter random, modes of softmax of either sign."""
    mixer = mixer_of(**own)
    with torch.no_grad():
        mixer.Lambda_re.copy_(torch.tensor([0.4, -0.7, 1.5, -2.0, 0.1, -0.3], dtype=torch.float64))
        mixer.log_dt.add_(0.3 * torch.randn_like(mixer.log_dt) + 1)
    return mixer


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def dense(mixer: DSSMixer, length: int) -> Tensor:
    """K: (1, H, length) by proposition 1, with quotients as they are: every power of every mode laid out."""
    dt = mixer.log_dt.exp()
    re = -mixer.Lambda_re.exp() if mixer.version == "exp" else mixer.Lambda_re
    Lambda = torch.complex(re, mixer.Lambda_im)
    z = torch.complex(dt[:, :1] * re, dt[:, -1:] * mixer.Lambda_im)
    S = (z.unsqueeze(-1) * torch.arange(mixer.length)).exp()
    S = S / S.sum(-1, keepdim=True) if mixer.version == "softmax" else S * (z.exp() - 1).unsqueeze(-1)
    return torch.einsum("chn,hnl->chl", torch.view_as_complex(mixer.W) / Lambda, S)[..., :length].real


def test_softmax_equals_the_authors() -> None:
    g = golden("dss_softmax")
    assert (g["param.Lambda"].real > 0).any()
    assert (g["param.Lambda"].real < 0).any()
    mixer = load(mixer_of(separate_dt=True), g)
    close(mixer.kernel(64), g["mid.kernel"])
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer(x, everything(x))
    close(y.mT, g["y"])
    close(torch.autograd.grad(y, x, g["w"].mT)[0].mT, g["grad.x"])


def test_exp_equals_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernel was cut off in this one."""
    g = golden("dss_exp")
    mixer = load(mixer_of(version="exp"), g)
    taps = g["mid.kernel"].shape[-1]
    close(mixer.kernel(taps), g["mid.kernel"])
    monkeypatch.setattr(mixer, "kernel", lambda length: DSSMixer.kernel(mixer, taps))
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer(x, everything(x))
    close(y.mT, g["y"])
    close(torch.autograd.grad(y, x, g["w"].mT)[0].mT, g["grad.x"])


def test_two_heads_both_ways_equal_the_authors() -> None:
    g = golden("dss_exp_bidirectional")
    own = {"version": "exp", "separate_dt": True, "direction": "bidirectional"}
    heads = [load(mixer_of(**own), g, head) for head in range(2)]
    for head, mixer in enumerate(heads):
        close(mixer.kernel(64), g["mid.kernel"][head::2])
    x = g["x"].mT.contiguous().requires_grad_()
    y = torch.stack([mixer(x, everything(x)) for mixer in heads]).sum(0)
    close(y.mT, g["y"])
    close(torch.autograd.grad(y, x, g["w"].mT)[0].mT, g["grad.x"])


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("version", ["softmax", "exp"])
@pytest.mark.parametrize("length", [64, 23])
def test_kernel_and_its_gradients_equal_the_dense_softmax(
    version: str, separate: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mixer = signed(version=version, separate_dt=separate)
    torch.testing.assert_close(mixer.kernel(length), dense(mixer, length), rtol=0, atol=1e-5)
    monkeypatch.setattr("lra.architectures.state_space.dss.EPSILON", 0.0)
    close(mixer.kernel(length), dense(mixer, length))
    w = torch.randn(1, 4, length, dtype=torch.float64)
    names = ("log_dt", "Lambda_re", "Lambda_im", "W")
    parameters = [mixer.get_parameter(name) for name in names]
    ours, others = (
        torch.autograd.grad((K * w).sum(), parameters) for K in (mixer.kernel(length), dense(mixer, length))
    )
    for name, own, other in zip(names, ours, others, strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_gradients_of_every_parameter_equal_the_recurrence(version: str, separate: bool) -> None:
    """The state written out, without the turn of rising modes: s_t = e^z s_{t-1} + u_t, y_t = Re C s_t + D u_t."""
    torch.manual_seed(0)
    mixer = signed(version=version, separate_dt=separate)
    x = torch.randn(2, 19, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)
    names, parameters = zip(("x", x), *mixer.named_parameters(), strict=True)
    y, own = mixer(x, everything(x)), stepped(mixer, x)
    dt = mixer.log_dt.exp()
    re = -mixer.Lambda_re.exp() if version == "exp" else mixer.Lambda_re
    z = torch.complex(dt[:, :1] * re, dt[:, -1:] * mixer.Lambda_im)
    scale = (z.exp() - 1) / torch.complex(re, mixer.Lambda_im)
    C = torch.view_as_complex(mixer.W)[0] * (scale / ((64 * z).exp() - 1) if version == "softmax" else scale)
    state, rows = torch.zeros(2, 4, 6, dtype=torch.complex128), []
    for u in x.unbind(1):
        state = z.exp() * state + u.unsqueeze(-1)
        rows.append((C * state).sum(-1).real + mixer.D * u)
    h = torch.stack(rows, 1)
    written = mixer.output_linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
    close(own, y)
    torch.testing.assert_close(y, written, rtol=0, atol=1e-5 if version == "softmax" else 1e-12)
    loss = (y * w).sum()
    for other, tight in ((own, 1e-10), (written, 1e-4 if version == "softmax" else 1e-10)):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        wanted = torch.autograd.grad((other * w).sum(), parameters, retain_graph=True)
        for name, a, b in zip(names, found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=tight, atol=tight), name


@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_step_equals_forward_over_2048_tokens(version: str) -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(signed(length=2048, version=version).float(), 4, rtol=1e-4, atol=2e-5)


def test_rising_modes_do_not_overflow() -> None:
    """e^(zl) alone would reach e^2000. What is left of such a mode is its last place, the first token's at the end."""
    mixer = mixer_of(length=1000).float()
    with torch.no_grad():
        mixer.Lambda_re.fill_(1.0)
        mixer.log_dt.fill_(math.log(2.0))
    K = mixer.kernel(1000)
    assert K.isfinite().all()
    assert (K[..., :900] == 0).all()
    W, Lambda = torch.view_as_complex(mixer.W), torch.complex(mixer.Lambda_re, mixer.Lambda_im)
    last = (W * (1 - (-2 * Lambda).exp()) / Lambda).sum(-1).real
    torch.testing.assert_close(K[..., -1], last, rtol=1e-3, atol=1e-4)
    x = torch.randn(1, 1000, 4)
    with torch.no_grad():
        torch.testing.assert_close(stepped(mixer, x), mixer(x, everything(x)), rtol=1e-4, atol=2e-5)
    for name in ("log_dt", "Lambda_re", "Lambda_im", "W"):
        (grad,) = torch.autograd.grad(K.sum(), mixer.get_parameter(name), retain_graph=True)
        assert grad.isfinite().all(), name


def test_every_row_of_the_softmax_sums_to_one() -> None:
    """W / Lambda = 1 in one mode alone: K sums to 1 over `length` places, however fast the mode falls or rises."""
    mixer = signed()
    Lambda = torch.complex(mixer.Lambda_re, mixer.Lambda_im)
    for n in range(6):
        with torch.no_grad():
            mixer.W.zero_()
            mixer.W[0, :, n] = torch.view_as_real(Lambda[n])
        torch.testing.assert_close(mixer.kernel(64).sum(-1), torch.ones(1, 4).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_start_is_skew_hippo(version: str) -> None:
    """-1/2 and the positive half of the spectrum of the skew part, the authors' and ours from the matrix itself."""
    torch.manual_seed(0)
    g = golden(f"dss_{version}")
    mixer = mixer_of(d_model=500, version=version, separate_dt=True)
    re = -mixer.Lambda_re.exp() if version == "exp" else mixer.Lambda_re
    Lambda = torch.complex(re, mixer.Lambda_im).detach()
    torch.testing.assert_close(Lambda, g["mid.init.Lambda"].to(torch.complex128), rtol=1e-5, atol=1e-5)
    b = np.sqrt(2 * np.arange(12) + 1)
    lower = np.tril(np.outer(b, b), -1)
    spectrum = np.sort(np.linalg.eigvals((lower - lower.T) / 2).imag)[::-1][:6].copy()
    torch.testing.assert_close(Lambda.imag, torch.from_numpy(spectrum), rtol=1e-6, atol=0)
    dt = mixer.log_dt.exp()
    assert torch.equal(dt[:, 0], dt[:, 1])
    assert dt.min() >= 0.001 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    assert 0.007 < dt.median() < 0.014
    assert 0.95 < mixer.W.std() < 1.05


def test_optimiser_settings_reach_the_kernel_alone() -> None:
    encoder = DSS(d_model=8, n_layers=2, length=8, ssm_lr=5e-4, dt_lr=0.02)
    rates = {
        name: settings["lr"]
        for name, _ in encoder.named_parameters()
        for pattern, settings in encoder.optim.items()
        if fnmatch(name, pattern)
    }
    own = {"log_dt": 0.02, "Lambda_re": 5e-4, "Lambda_im": 5e-4, "W": 5e-4}
    assert rates == {f"layers.{i}.mixer.{name}": rate for i in range(2) for name, rate in own.items()}
    assert all(settings["weight_decay"] == 0.0 for settings in encoder.optim.values())


def test_step_sizes_may_train_faster_than_the_rest() -> None:
    """As in the runs of ListOps and Text, where log_dt has twice the base rate."""
    for scale, rate in ((1.0, 0.01), (2.0, 0.02)):
        encoder = DSS(d_model=8, n_layers=1, length=8, dt_lr=0.02, dt_lr_scale=scale)
        groups = parameter_groups(encoder, encoder, Optim(lr=0.01))
        log_dt = encoder.get_parameter("layers.0.mixer.log_dt")
        assert [g["lr"] for g in groups if any(p is log_dt for p in g["params"])] == [rate]


def test_longer_than_its_softmax_is_refused() -> None:
    with pytest.raises(ValueError, match="length 65 exceeds the 64 places"):
        mixer_of().kernel(65)
    assert mixer_of(version="exp").kernel(65).shape == (1, 4, 65)


test_wrong_arguments_are_named = refuses(DSS, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"version": "clip"}, "softmax, exp"),
    ({"dt_min": 0.2}, "dt_min is 0.2"),
    ({"direction": "add"}, "direction is 'add'"),
)
