"""hydra against tensors of the authors' module, and its scans against the quasiseparable matrix written out."""

from __future__ import annotations

from typing import Any

import torch
from golden_tensors import assert_gradients, assert_near, everything, golden
from refusals import refuses
from torch.nn import functional as F

from lra.architectures.state_space.hydra import Hydra, HydraMixer


def mixer_of(**own: Any) -> HydraMixer:
    shape = {"d_model": 6, "n_layers": 1, "length": 32, "state_size": 3, "head_dim": 4}
    mixer = Hydra(**{**shape, **own}).blocks[0].mixer
    assert isinstance(mixer, HydraMixer)
    return mixer.double()


def test_mixer_equals_that_of_the_authors() -> None:
    g = golden("hydra")
    mixer = mixer_of(
        state_size=int(g["cfg.d_state"]), head_dim=int(g["cfg.headdim"]), n_groups=int(g["cfg.ngroups"]), d_conv=7
    )
    mixer.load_state_dict({key.removeprefix("param."): t for key, t in g.items() if key.startswith("param.")})
    x = g["x"].requires_grad_()
    _, xBC, dt = mixer.in_proj(x).split(mixer.sizes, dim=-1)
    assert_near(mixer.mix(xBC, dt, everything(x)), g["mid.mixed"], "mixed sequence")
    y = mixer(x, everything(x))
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, {name: (p, g[f"grad.param.{name}"]) for name, p in mixer.named_parameters()})


def test_mixing_is_a_quasiseparable_matrix() -> None:
    """Two groups, five taps, entry by entry: c_{i-1} . b_j below the diagonal, c_{i+1} . b_j above it."""
    torch.manual_seed(0)
    mixer = mixer_of(n_groups=3, d_conv=5)
    length, heads, width = 9, mixer.n_heads, 4
    xBC = torch.randn(1, length, sum(mixer.inner), dtype=torch.float64)
    dt = torch.randn(1, length, 2 * heads, dtype=torch.float64)
    taps = F.conv1d(xBC.mT, mixer.conv1d.weight, mixer.conv1d.bias, padding=2, groups=sum(mixer.inner)).mT
    x, *rest = F.silu(taps)[0].split(mixer.inner, dim=-1)
    B, C, B_back, C_back = (t.unflatten(-1, (3, -1)) for t in rest)
    steps = F.softplus(dt[0] + mixer.dt_bias.repeat(2)).unflatten(-1, (2, heads))
    M = torch.diag_embed((mixer.fc_D(x) + mixer.D).T)  # (heads, L, L)
    for head in range(heads):
        rate = -mixer.A_log[head].exp()
        for i in range(length):
            for j in range(i):
                between = (steps[j + 1 : i, 0, head].sum() * rate).exp()
                M[head, i, j] = C[i - 1, head] @ B[j, head] * between * steps[j, 0, head]
            for j in range(i + 1, length):
                between = (steps[i + 1 : j, 1, head].sum() * rate).exp()
                M[head, i, j] = C_back[i + 1, head] @ B_back[j, head] * between * steps[j, 1, head]
    expected = torch.einsum("hij,jhp->ihp", M, x.unflatten(-1, (heads, width))).flatten(-2)
    mask = torch.ones(1, length, dtype=torch.bool)
    assert_near(mixer.mix(xBC, dt, mask)[0], expected, "mixed sequence")


test_wrong_arguments_are_named = refuses(Hydra, d_model=8, n_layers=1, length=8)(
    ({"direction": "causal"}, "direction is 'causal'"),
    ({"state_size": 0}, "state_size is 0"),
    ({"d_conv": 4}, "d_conv is 4"),
    ({"head_dim": 5}, "head_dim is 5"),
    ({"n_groups": 3}, "n_groups is 3"),
)
