"""cfc against tensors of ncps: every form at irregular times, and the network it approximates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from recurrences import agrees, load, padded
from refusals import refuses
from torch import Tensor

from lra.architectures.recurrent.cfc import CfC, CfCMixer, LTCMixer


def at_times(mixer: Any, times: Tensor) -> Any:
    """The mixer with tokens that come `times` (B, L) after one another, in one call or token by token."""
    asked = iter(times.unbind(1) * 2)  # step by step once with and once without a gradient

    def elapsed(x: Tensor) -> Tensor:
        return times.unsqueeze(-1) if x.shape[1] > 1 else next(asked).view(-1, 1, 1)

    mixer.elapsed = elapsed
    return mixer


def shared(g: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by our names: the first layer of the backbone sees 4 features and h, padded to 5 and h."""
    own = {key.removeprefix("param.").replace(".", "__"): value for key, value in g.items() if key.startswith("param.")}
    first = own["backbone__0__weight"]
    own["backbone__0__weight"] = torch.cat([padded(first[:, :4], 6, 5), first[:, 4:]], dim=1)
    return own


@pytest.mark.parametrize("mode", ["default", "no-gate", "pure"])
def test_cell_equals_ncps(mode: str) -> None:
    g = golden(f"cfc_{mode.replace('-', '_')}")
    mixer = CfCMixer(5, 6, mode, mixed_memory=False).double()
    load(mixer, **shared(g))
    last = agrees(at_times(mixer, g["timespans"]), g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def test_mixed_memory_equals_ncps() -> None:
    g = golden("cfc_mixed_memory")
    mixer = CfCMixer(5, 6, "default", mixed_memory=True).double()
    own = shared(g)
    own["lstm__input_map__weight"] = padded(own["lstm__input_map__weight"], 20, 5)
    load(mixer, **own)
    h, c = agrees(mixer, g, (g["h0"], g["c0"]))
    torch.testing.assert_close(h, g["h_n"], rtol=0, atol=1e-12)
    torch.testing.assert_close(c, g["c_n"], rtol=0, atol=1e-12)


def test_ltc_equals_ncps() -> None:
    """A synapse that their graph cuts has no strength here; their outputs map the first three units."""
    g = golden("ltc")
    mixer = LTCMixer(4, units=5, unfolds=6).double()
    own = {key.removeprefix("param."): value for key, value in g.items() if key.startswith("param.")}
    own["w"] = own["w"] * g["cfg.sparsity_mask"]
    own["sensory_w"] = own["sensory_w"] * g["cfg.sensory_sparsity_mask"]
    out, bias = own.pop("output_w"), own.pop("output_b")
    load(mixer, out__weight=padded(torch.diag(out), 4, 5), out__bias=padded(bias, 4), **own)
    last = agrees(at_times(mixer, g["timespans"]), g, g["h0"])
    torch.testing.assert_close(last, g["h_n"], rtol=0, atol=1e-12)


def test_ltc_puts_negative_strengths_back() -> None:
    mixer = LTCMixer(4, units=3, unfolds=2)
    with torch.no_grad():
        mixer.w[0, 0], mixer.cm[1] = -1.0, -2.0
    mixer(torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert mixer.w.min() == 0
    assert mixer.cm.min() == 0
    assert mixer.w.grad is not None


test_wrong_arguments_are_named = refuses(CfC, d_model=8, n_layers=1, length=16)(
    ({"mode": "gated"}, "default, no-gate, pure, ltc"),
    ({"mode": "pure", "mixed_memory": True}, "needs the default mode"),
    ({"units": 0}, "units is 0"),
    ({"unfolds": 0}, "unfolds is 0"),
)
