"""seq2seq_attention against tensors of the papers' equations, four scores, and torch.nn.GRU for its states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import golden
from recurrences import padded, same_gradients
from refusals import refuses
from torch import Tensor

from lra.architectures.recurrent import seq2seq_attention
from lra.architectures.recurrent.seq2seq_attention import SCORES, Seq2SeqAttention, Seq2SeqAttentionMixer


def score_weights(g: dict[str, Tensor], name: str, width: int) -> tuple[str, dict[str, Tensor]]:
    """Our score and its weights. The stored states are 5 features wide and some queries 6: states get a zero."""
    if name == "bahdanau":
        weights = {"W_q": padded(g["param.W_q"], 7, width), "W_k": padded(g["param.W_k"], 7, width)}
        return "additive", weights | {"b": g["param.b"], "v": g["param.v"]}
    if name == "luong_concat":
        W_q, W_k = g["param.W_a"].split([6, 5], dim=1)
        weights = {"W_q": W_q, "W_k": padded(W_k, 7, 6), "b": torch.zeros(7), "v": g["param.v_a"]}
        return "additive", weights
    if name == "luong_general":
        return "general", {"W_a": padded(g["param.W_a"], width, width)}
    return "dot", {}


@pytest.mark.parametrize("name", ["bahdanau", "luong_concat", "luong_dot", "luong_general"])
@pytest.mark.parametrize("largest", [1, 2**24])
def test_reading_equals_the_closed_form(name: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """largest: additive scores one query after the other, and all at once."""
    monkeypatch.setattr(seq2seq_attention, "LARGEST", largest)
    g = golden(f"attention_{name}")
    width = g["query"].shape[-1]
    score, weights = score_weights(g, name, width)
    mixer = Seq2SeqAttentionMixer(width, score, 7, horizon=2).double()
    context, query = g["param.W_c"].split([5, width], dim=1)
    weights["W_c"] = torch.cat([padded(context, width, width), query], dim=1)
    with torch.no_grad():
        for key, value in weights.items():
            mixer.get_parameter(key).copy_(value)
    x = padded(g["x"], 3, 9, width).requires_grad_()
    y = mixer.read(g["query"], x, torch.arange(9) < g["lengths"].unsqueeze(1))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad[..., :5], g["grad.x"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("largest", [1, 400, 2**24])
def test_layer_and_every_gradient_equal_the_equations(
    score: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seq2seq_attention, "LARGEST", largest)
    torch.manual_seed(0)
    mixer: Any = Seq2SeqAttentionMixer(6, score, 4, horizon=5).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    own = dict(zip(names, (mixer.input.weight, mixer.U, mixer.input.bias, mixer.c), strict=True))
    theirs = torch.nn.GRU(6, 6, batch_first=True).double()
    h = torch.func.functional_call(theirs, own, (x,))[0]
    outputs = []
    for t in range(9):
        past = h[:, : t + 1]
        if score == "additive":
            inside = (h[:, t] @ mixer.W_q.T).unsqueeze(1) + past @ mixer.W_k.T + mixer.b
            scores = torch.tanh(inside) @ mixer.v
        else:
            keys = past @ mixer.W_a.T if score == "general" else past
            scores = (keys @ h[:, t].unsqueeze(-1)).squeeze(-1)
        context = (torch.softmax(scores, dim=-1).unsqueeze(-1) * past).sum(1)
        outputs.append(torch.tanh(torch.cat([context, h[:, t]], dim=-1) @ mixer.W_c.T))
    same_gradients(mixer, x, torch.stack(outputs, 1))


test_wrong_arguments_are_named = refuses(Seq2SeqAttention, d_model=8, n_layers=1, length=16)(
    ({"score": "cosine"}, "additive, dot, general"),
    ({"units": 0}, "units is 0"),
)
