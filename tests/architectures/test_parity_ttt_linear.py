"""ttt_linear against tensors of the authors' layer, and gradient descent with PyTorch's own derivatives."""

from __future__ import annotations

import torch
from golden_tensors import assert_close, assert_layer_as_stored, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.linear_attention.ttt_linear import TTTLinear, TTTLinearMixer


def loaded(g: dict[str, Tensor]) -> TTTLinearMixer:
    mixer = TTTLinearMixer(g["x"].shape[-1], int(g["cfg.heads"]), int(g["cfg.mini_batch_size"])).double()
    mixer.load_state_dict({name: g[f"param.{name}"] for name, _ in mixer.named_parameters()})
    return mixer


def test_layer_equals_the_authors() -> None:
    g = golden("ttt_linear")
    mixer, reads = loaded(g), []
    mixer.post_norm.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0]))
    assert_layer_as_stored(mixer, g)
    assert_close(reads[0], g["mid.ttt_out"], 1e-12)


def test_step_equals_the_authors() -> None:
    g = golden("ttt_linear")
    assert_close(run(loaded(g), g["x"])[0], g["y"], 1e-12)


def descended(mixer: TTTLinearMixer, q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> list[Tensor]:
    """One head of one sequence: q, k, v: (L, F) with their positions, rate: (L,). The inner loss is differentiated."""
    W, b = (t[0].detach().clone().requires_grad_() for t in (mixer.W1, mixer.b1))
    eta, outputs, size = mixer._eta(), [], mixer.mini_batch

    def model(u: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(u @ W + b, (len(W),), mixer.ttt_norm_weight[0], mixer.ttt_norm_bias[0], 1e-6)

    for start in range(0, len(q), size):
        of_W, of_b = torch.zeros_like(W), torch.zeros_like(b)
        now_W, now_b = W, b
        for i in range(min(size, len(q) - start)):
            t = start + i
            loss = (model(k[t : t + 1], W, b) - (v[t] - k[t])).square().sum() / 2
            grads = torch.autograd.grad(loss, (W, b))
            of_W, of_b = of_W + rate[t] * grads[0], of_b + rate[t] * grads[1]
            now_W, now_b = W - eta[i] * of_W, b - eta[i] * of_b
            outputs.append(q[t] + model(q[t : t + 1], now_W, now_b)[0])
        W, b = now_W.detach().requires_grad_(), now_b.detach().requires_grad_()
    return outputs


def test_reads_equal_gradient_descent() -> None:
    torch.manual_seed(0)
    mixer = TTTLinear(d_model=6, n_layers=1, length=32, n_heads=1, mini_batch=4).double().blocks[0].mixer
    assert isinstance(mixer, TTTLinearMixer)
    with torch.no_grad():
        for parameter in (mixer.W1, mixer.b1, mixer.ttt_norm_weight, mixer.ttt_norm_bias):
            parameter.normal_()
        mixer.learnable_token_idx.copy_(torch.tensor([0.2, -0.1, 0.3, -2.0]))  # the last rate is held at 0
    x, reads = torch.randn(1, 11, 6, dtype=torch.float64), []
    mixer.post_norm.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0]))
    mixer(x, everything(x))
    q, k, v = (x[0] @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    rate = torch.sigmoid(x[0] @ mixer.learnable_ttt_lr_weight[0, 0] + mixer.learnable_ttt_lr_bias[0]) / 6
    angle = (torch.arange(11) % 4)[:, None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = []
    for u in (q, k):
        pairs = torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous())
        turned.append(torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2))
    q, k = turned
    assert_close(reads[0][0], torch.stack(descended(mixer, q, k, v, rate)))


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = TTTLinear(d_model=128, n_layers=1, length=32).blocks[0].mixer
    assert isinstance(mixer, TTTLinearMixer)
    for weight in (mixer.W1, mixer.learnable_ttt_lr_weight):
        assert 0.018 < weight.std() < 0.022
    for zero in (mixer.b1, mixer.learnable_ttt_lr_bias, mixer.learnable_token_idx, mixer.ttt_norm_bias):
        assert not zero.any()
    torch.testing.assert_close(mixer._eta(), 1 / torch.arange(1.0, 17.0))


test_wrong_arguments_are_named = refuses(TTTLinear, d_model=8, n_layers=1, length=8)(
    ({"mini_batch": 0}, "mini_batch is 0; at least 1"),
    ({"n_heads": 8}, "n_heads is 8; d_model, 8, splits into heads of an even width"),
)
