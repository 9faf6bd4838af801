"""dnc against tensors of the authors' memory access, and a loop over the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.memory import dnc
from lra.architectures.memory.dnc import DNC, DNCMixer

ROWS = (
    "read_keys", "read_strengths", "write_keys", "write_strengths", "erase_vectors", "write_vectors", "free_gate",
    "allocation_gate", "write_gate", "read_mode",
)  # fmt: skip
STATE = ("memory", "usage", "write_weights", "precedence", "link", "read_weights")


def loaded(g: dict[str, Tensor]) -> DNCMixer:
    """Their x is what a controller of width 5 puts out."""
    mixer = DNCMixer(3, hidden=5, slots=6, width=4, reads=2).double()
    weight, bias = (torch.cat([g[f"param.{row}.{kind}"].t() for row in ROWS]) for kind in ("w", "b"))
    mixer.interface.load_state_dict({"weight": weight, "bias": bias})
    return mixer


def test_access_equals_that_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose strengths have no 1 added."""
    monkeypatch.setattr(dnc, "oneplus", F.softplus)
    g = golden("dnc_access_deepmind")
    mixer, x, outputs = loaded(g), g["x"].requires_grad_(), []
    state = tuple(g[f"{name}0"] for name in STATE)
    for t in range(6):
        reads, state = mixer.access(mixer.interface(x[:, t]), state)
        for name, found in zip(STATE, state, strict=True):
            assert_near(found, g[f"mid.{name}"][:, t], f"{name} at token {t}")
        outputs.append(reads.flatten(1))
    y = torch.stack(outputs, 1)
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, {})


def content(memory: Tensor, key: Tensor, strength: Tensor) -> Tensor:
    norms = (memory.square().sum(1) + 1e-6).sqrt() * (key.square().sum() + 1e-6).sqrt() + 1e-6
    return ((1 + F.softplus(strength)) * (memory @ key) / norms).softmax(0)


def written_out(mixer: DNCMixer, x: Tensor) -> Tensor:
    hidden, n, width, heads = mixer.sizes
    outputs = []
    for row in x:
        h, c, reads = x.new_zeros(hidden), x.new_zeros(hidden), x.new_zeros(heads * width)
        memory, usage, w, p = x.new_zeros(n, width), x.new_zeros(n), x.new_zeros(n), x.new_zeros(n)
        link, r = x.new_zeros(n, n), [x.new_zeros(n)] * heads
        for token in row:
            gates = mixer.weight_ih @ torch.cat([token, reads]) + mixer.weight_hh @ h + mixer.bias
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            keys, strengths, key, strength, erase, add, free, g_a, g_w, modes = mixer.interface(h).split(mixer.parts)
            w = w.detach()
            usage = usage + w - usage * w
            for head in range(heads):
                usage = usage * (1 - free[head].sigmoid() * r[head])
            squeezed, a, product = 1e-6 + (1 - 1e-6) * usage, [x.new_zeros(())] * n, x.new_ones(())
            for slot in squeezed.detach().sort(stable=True).indices.tolist():
                a[slot] = (1 - squeezed[slot]) * product
                product = product * squeezed[slot]
            w = g_w.sigmoid() * (
                g_a.sigmoid() * torch.stack(a) + (1 - g_a.sigmoid()) * content(memory, key, strength[0])
            )
            memory = memory * (1 - torch.outer(w, erase.sigmoid())) + torch.outer(w, add)
            links = [
                [(1 - w[j] - w[k]) * link[j, k] + w[j] * p[k] if j != k else x.new_zeros(()) for k in range(n)]
                for j in range(n)
            ]
            link = torch.stack([torch.stack(line) for line in links])
            p = (1 - w.sum()) * p + w
            parts, now = [], []
            for head in range(heads):
                m = modes[3 * head : 3 * head + 3].softmax(0)
                found = content(memory, keys[head * width : (head + 1) * width], strengths[head])
                now.append(m[0] * (link.T @ r[head]) + m[1] * (link @ r[head]) + m[2] * found)
                parts.append(now[-1] @ memory)
            r, reads = now, torch.cat(parts)
            outputs.append(mixer.fc(torch.cat([h, reads])))
    return torch.stack(outputs).view(x.shape)


def test_mixer_equals_the_equations() -> None:
    torch.manual_seed(0)
    mixer = DNCMixer(4, hidden=5, slots=4, width=3, reads=2).double()
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: written_out(mixer, x))


def test_the_first_write_goes_to_a_free_slot() -> None:
    """Slots 0 and 2 are used, 1 hardly, and 3 and 4 are free: the first of them is taken."""
    a = dnc.allocation(torch.tensor([[1.0, 0.2, 0.9, 0.0, 0.0]], dtype=torch.float64))
    assert_near(a, torch.tensor([[0.0, 0, 0, 1, 0]], dtype=torch.float64), "allocation", 1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"), [({name: 0}, f"{name} is 0; at least 1") for name in ("hidden", "slots", "width", "reads")]
)
def test_bad_arguments(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DNC(**{"d_model": 4, "n_layers": 1, "length": 8, **wrong})
