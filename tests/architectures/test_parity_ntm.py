"""ntm against tensors of a public neural Turing machine, and a loop over the equations."""

from __future__ import annotations

import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.memory.ntm import NTM, NTMMixer


def loaded(g: dict[str, Tensor]) -> NTMMixer:
    mixer = NTMMixer(3, hidden=6, slots=8, width=5).double()
    # theirs puts out 4 features
    mixer.fc = torch.nn.Linear(11, 4).double()
    lstm = "param.controller.lstm"
    mixer.load_state_dict({
        "weight_ih": g[f"{lstm}.weight_ih_l0"], "weight_hh": g[f"{lstm}.weight_hh_l0"],
        "bias": g[f"{lstm}.bias_ih_l0"] + g[f"{lstm}.bias_hh_l0"],
        "h0": g[f"{lstm}_h_bias"].flatten(), "c0": g[f"{lstm}_c_bias"].flatten(),
        "fc_read.weight": g["param.heads.0.fc_read.weight"], "fc_read.bias": g["param.heads.0.fc_read.bias"],
        "fc_write.weight": g["param.heads.1.fc_write.weight"], "fc_write.bias": g["param.heads.1.fc_write.bias"],
        "fc.weight": g["param.fc.weight"], "fc.bias": g["param.fc.bias"],
        "memory0": g["memory0"], "read0": g["read0"].flatten(),
    })  # fmt: skip
    return mixer


def test_machine_equals_a_public_one() -> None:
    g = golden("ntm")
    mixer, x = loaded(g), g["x"].requires_grad_()
    state = mixer.init_state(2)
    for t in range(7):
        _, state = mixer.step(x[:, t], state)
        _, _, read, memory, w = state
        for found, name in ((memory, "memory"), (read, "reads"), (w[:, 0], "read_weights"), (w[:, 1], "write_weights")):
            assert_near(found, g[f"mid.{name}"][:, t], f"{name} at token {t}")
    assert_near(state[0], g["h_n"], "h")
    assert_near(state[1], g["c_n"], "c")
    y = mixer(x, everything(x)).sigmoid()  # their output map ends in a sigmoid
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, {})


def written_out(mixer: NTMMixer, x: Tensor) -> Tensor:
    _, slots, width = mixer.sizes
    outputs = []
    for row in x:
        h: Tensor = mixer.h0
        c: Tensor = mixer.c0
        read, memory = mixer.read0, mixer.memory0
        last = [torch.zeros(slots, dtype=x.dtype)] * 2
        for token in row:
            gates = mixer.weight_ih @ torch.cat([token, read]) + mixer.weight_hh @ h + mixer.bias
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            old, now = memory, []
            for head, w in zip((mixer.fc_read, mixer.fc_write), last, strict=True):
                out = head(h)
                key, beta, gate = out[:width], F.softplus(out[width]), out[width + 1].sigmoid()
                s, gamma = out[width + 2 : width + 5].softmax(0), 1 + F.softplus(out[width + 5])
                content = (beta * F.cosine_similarity(old, key.unsqueeze(0), dim=1)).softmax(0)
                mixed = gate * content + (1 - gate) * w
                shifted = [sum(s[j] * mixed[(n - 1 + j) % slots] for j in range(3)) for n in range(slots)]
                sharp = torch.stack(shifted) ** gamma
                now.append(sharp / sharp.sum())
            last = now
            read = last[0] @ old
            erase, add = mixer.fc_write(h)[width + 6 :].chunk(2)
            memory = old * (1 - torch.outer(last[1], erase.sigmoid())) + torch.outer(last[1], add)
            outputs.append(mixer.fc(torch.cat([h, read])))
    return torch.stack(outputs).view(x.shape)


def test_mixer_equals_the_equations() -> None:
    torch.manual_seed(0)
    mixer = NTMMixer(4, hidden=5, slots=6, width=3).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: written_out(mixer, x))


test_bad_arguments = refuses(NTM, d_model=4, n_layers=1, length=8)(
    ({"slots": 2}, "slots is 2; at least 3"),
    ({"width": 0}, "width is 0"),
    ({"hidden": 0}, "hidden is 0; at least 1"),
)
