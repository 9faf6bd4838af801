"""memorizing against tensors of a public layer, and a loop over the tokens."""

from __future__ import annotations

import math

import pytest
import torch
from golden_tensors import assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.memory.memorizing import Memorizing, MemorizingMixer, buckets


def loaded(g: dict[str, Tensor]) -> MemorizingMixer:
    """One head of keys and values for two of queries, and no biases."""
    mixer = MemorizingMixer(8, 2, 10, segment=6, k=3, memory=11, dropout=0.0, n_kv_heads=1).double()
    state = {name: torch.zeros_like(t) for name, t in mixer.state_dict().items()}
    state |= {"qkv.weight": torch.cat([g["param.to_q.weight"], g["param.to_kv.weight"]])}
    state |= {"out.weight": g["param.to_out.weight"], "log_scale": g["param.scale"]}
    mixer.load_state_dict(state | {"gate_bias": g["mid.paper_gate_bias"]})
    return mixer


def test_layer_equals_a_public_one_under_the_paper_s_gate() -> None:
    g = golden("memorizing_attention")
    mixer = loaded(g)
    q, k, v = mixer.heads(g["x"])
    stored = [[t[:, None, :, part] for part in (0, 1)] for t in (g["in.mem_kv"], g["in.xl_memory"])]
    (mem_k, mem_v), (xl_k, xl_v) = stored
    assert torch.equal(mixer.nearest(q, mem_k)[1], g["mid.retrieved_indices"])
    bias = g["in.rel_pos_bias"][0] + mixer.bias(6, 10)
    local = mixer.local(q, torch.cat([xl_k, k], 2), torch.cat([xl_v, v], 2), bias)
    y = mixer.joined(mixer.recalled(q, mem_k, mem_v), local)
    assert_near(mixer.out(y.transpose(1, 2).flatten(2)), g["mid.paper_y"], "y")


def test_layer_equals_a_public_one_under_its_own_gate() -> None:
    """Theirs has one softmax over memories and local keys: a gate of the share that the memories have in its sum. The
    parts of the layer are put together here, as its forward takes no gate and no memory from outside."""
    g = golden("memorizing_attention")
    mixer, x = loaded(g), g["x"].requires_grad_()
    q, k, v = mixer.heads(x)
    (mem_k, mem_v), (xl_k, xl_v) = (g[f"in.{n}"].unsqueeze(1).unbind(3) for n in ("mem_kv", "xl_memory"))
    added = g["in.rel_pos_bias"].requires_grad_()
    bias, keys, values = added[0] + mixer.bias(6, 10), torch.cat([xl_k, k], 2), torch.cat([xl_v, v], 2)
    sums = [mixer.nearest(q, mem_k)[0], q @ keys.mT * mixer.log_scale.exp() + bias]
    gate = (sums[0].logsumexp(-1) - sums[1].logsumexp(-1)).sigmoid().unsqueeze(-1)
    y = gate * mixer.recalled(q, mem_k, mem_v) + (1 - gate) * mixer.local(q, keys, values, bias)
    out = mixer.out(y.transpose(1, 2).flatten(2))
    assert_near(out, g["y"], "y")
    (out * g["w"]).sum().backward()
    assert mixer.qkv.weight.grad is not None
    found = {
        "x": x.grad,
        "rel_pos_bias": added.grad,
        "scale": mixer.log_scale.grad,
        "to_out.weight": mixer.out.weight.grad,
    }
    found |= dict(zip(("to_q.weight", "to_kv.weight"), mixer.qkv.weight.grad.split(10), strict=True))
    for name, grad in found.items():
        assert_near(grad, g[f"grad.{name}"], name)


def test_scores_are_those_of_the_public_layer() -> None:
    g = golden("memorizing_attention")
    mixer = loaded(g)
    q, k, v = mixer.heads(g["x"])
    mem_k, mem_v = (g["in.mem_kv"][:, None, :, part] for part in (0, 1))
    scores, places = mixer.nearest(q, mem_k)
    rows = mem_v.expand(-1, 2, -1, -1).gather(2, places.flatten(2).unsqueeze(-1).expand(-1, -1, -1, 5))
    # theirs has one softmax over memories and local keys
    local = q @ k.mT * mixer.log_scale.exp() + mixer.bias(6, 6)
    weights = torch.cat([scores, local], -1).softmax(-1).tensor_split([3], dim=-1)
    y = (weights[0].unsqueeze(-2) @ rows.unflatten(2, (6, 3))).squeeze(-2) + weights[1] @ v
    assert_near(mixer.out(y.transpose(1, 2).flatten(2)), g["mid.y_plain"], "y")


def written_out(mixer: MemorizingMixer, x: Tensor) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (2, -1)).unbind(2) for part in F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, -1)
    )
    size, outputs = mixer.segment, []
    for t in range(x.shape[1]):
        segment, heads = t // size, []
        for h in range(2):
            keys = k[h] / k[h].norm(dim=-1, keepdim=True)
            query = q[h][:, t] / q[h][:, t].norm(dim=-1, keepdim=True)
            own = torch.arange(x.shape[1]).unsqueeze(-1) // size == segment
            keys, values = keys.where(own, keys.detach()), v[h].where(own, v[h].detach())
            scores = mixer.log_scale[h].exp() * (keys * query.unsqueeze(1)).sum(-1)
            first = max(0, (segment - 1) * size)
            relative = mixer.relative[h, buckets(t - torch.arange(first, t + 1))]
            y = ((scores[:, first : t + 1] + relative).softmax(-1).unsqueeze(-1) * values[:, first : t + 1]).sum(1)
            past = scores[:, max(0, first - mixer.memory) : first]
            if past.shape[1] and mixer.gate_bias is not None:
                least = past.sort(dim=-1, descending=True).values[:, min(mixer.k, past.shape[1]) - 1]
                weights = past.masked_fill(past < least.unsqueeze(1), -torch.inf).softmax(-1)
                recalled = (weights.unsqueeze(-1) * values[:, first - past.shape[1] : first]).sum(1)
                gate = mixer.gate_bias[h].sigmoid()
                y = gate * recalled + (1 - gate) * y
            heads.append(y)
        outputs.append(mixer.out(torch.cat(heads, -1)))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("memory", [0, 5, 100])
def test_mixer_equals_the_equations(memory: int) -> None:
    torch.manual_seed(0)
    mixer = MemorizingMixer(6, 2, 8, segment=4, k=3, memory=memory, dropout=0.0).double()
    for name in ("relative", "gate_bias", "qkv.bias"):
        if memory or name != "gate_bias":
            torch.nn.init.normal_(mixer.get_parameter(name))
    x = torch.randn(2, 18, 6, dtype=torch.float64)
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: written_out(mixer, x))


def test_the_state_holds_no_more_than_can_be_read() -> None:
    mixer = MemorizingMixer(6, 2, 8, segment=4, k=3, memory=5, dropout=0.0)
    state = mixer.init_state(1)
    for t in range(30):
        _, state = mixer.step(torch.randn(1, 6), state)
        assert state[0].shape[2] <= 5 + 2 * 4, t


def test_buckets_are_those_of_t5() -> None:
    found = buckets(torch.tensor([0, 1, 15, 16, 17, 20, 64, 127, 128, 5000]))
    large = [16 + int(math.log(d / 16) / math.log(8) * 16) for d in (16, 17, 20, 64, 127)]
    assert found.tolist() == [0, 1, 15, *large, 31, 31]


def test_one_layer_has_a_memory() -> None:
    for layers, chosen in ((1, [0]), (2, [1]), (4, [2]), (12, [8])):
        encoder = Memorizing(d_model=8, n_layers=layers, length=64)
        assert [i for i, layer in enumerate(encoder.blocks) if layer.mixer.memory] == chosen
        assert encoder.blocks[0].mixer.segment == 8


test_bad_arguments = refuses(Memorizing, d_model=8, n_layers=2, length=8)(
    ({"segment": 0}, "segment is 0; at least 1"),
    ({"k": 0}, "k is 0; at least 1"),
    ({"memory": 0}, "memory is 0; at least 1"),
    ({"memory_layers": (2,)}, r"memory_layers is \[2\]; from 0 to 1"),
)
