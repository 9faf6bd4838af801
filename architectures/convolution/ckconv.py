"""CKConv: convolutions as long as the sequence, whose kernels a small network with sines computes from the position.

Romero, Kuzina, Bekkers, Tomczak and Hoogendoorn 2021, arXiv:2102.02611. N is `length`. A tap that looks j tokens back
stands at p_j = 1 - 2 j / (N - 1), and for every pair of output and input channel the kernel network (SIREN) gives

    a_1 = sin(w (V_1 p + c_1)),  a_2 = sin(w (V_2 a_1 + c_2)),  k(p) = V_3 a_2 + c_3         (D, D) at each p
    conv(x)_t = b + sum_{j <= t} k(p_j) x_{t-j}            (B, L, D)   by FFT, equation 1

w is `omega`. V_2 and V_3 are g v / |v|, one norm for each row; so is V_1 in the paper, where a row is one number and
the norm fixes nothing but its sign. A block of the network (CKCNN, section 5):

    h = relu(norm(conv(x))),  h = relu(norm(conv(h))),  x = relu(x + h)                      (B, L, D)

Kernels are those of `length`: a shorter sequence uses the taps it reaches. Most of the time goes to copies of the D^2
kernels and their spectra: an operator would multiply the spectra of all channels without transposing them.

Initialisation: V_1 uniform within 1, v_2 and v_3 within sqrt(6 / inputs) / w, g = |v|, c uniform within 1, b = 0, as
the authors intend for a SIREN; in their code the draws for V go into tensors that weight norm overwrites.

Departures: the norm is over the features of a token, as the paper's layer norm; the authors' code takes it over all
tokens too, so that a token's output depends on later ones. Their penalty on sampled kernels is left to the weight
decay. As theirs, the network stands alone, without the stack's norms and feed-forward parts; the bidirectional form
runs two of them. Resampling for another sampling rate is not built in.

Checked against: tensors of the authors' CKConv (kernel, output, gradient of x) and CKBlock, the latter with their norm
in the place of ours; a float64 loop over the equations, every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, one_of
from lra.architectures._norm import LayerNorm
from lra.architectures._precision import own_precision, wide
from lra.architectures._stack import Bidirectional
from lra.architectures._weight_norm import WeightNormConv1d
from lra.encoder import Card, Cost, Encoder, Mixer, clean_padding


class KernelNet(nn.Module):
    """Positions (1, 1, n) -> kernels (1, outputs, n)."""

    def __init__(self, hidden: int, outputs: int, omega: float) -> None:
        super().__init__()
        self.omega = omega
        self.first, self.second = nn.Conv1d(1, hidden, 1), WeightNormConv1d(hidden, hidden, 1)
        self.last = WeightNormConv1d(hidden, outputs, 1)
        nn.init.uniform_(self.first.weight, -1.0, 1.0)
        bound = math.sqrt(6 / hidden) / omega
        for layer in (self.second, self.last):
            nn.init.uniform_(layer.weight_v, -bound, bound)
            layer.weight_g.data = torch.norm_except_dim(layer.weight_v.detach(), 2, 0)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.uniform_(parameter, -1.0, 1.0)

    def forward(self, p: Tensor) -> Tensor:
        h = torch.sin(self.omega * self.first(p))
        return self.last(torch.sin(self.omega * self.second(h)))

    def cost(self, taps: int) -> Cost:
        outputs, hidden, _ = self.last.weight_v.shape
        maps = Cost.linear(taps, 1, hidden) + Cost.linear(taps, hidden, hidden) + Cost.linear(taps, hidden, outputs)
        return maps + Cost(other=6.0 * taps * hidden)


class CKConv1d(nn.Module):
    """Causal convolution with a continuous kernel: (B, L, in) -> (B, L, out). length: taps of the whole kernel, N."""

    def __init__(self, d_in: int, d_out: int, *, length: int, hidden: int, omega: float) -> None:
        super().__init__()
        self.length = length
        self.Kernel = KernelNet(hidden, d_out * d_in, omega)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def kernel(self, taps: int) -> Tensor:
        """(out, in, taps), the tap of the current token first."""
        weight = self.Kernel.first.weight
        back = torch.arange(taps, device=weight.device, dtype=weight.dtype)
        k = self.Kernel((1 - back * (2 / max(self.length - 1, 1))).view(1, 1, -1))
        return k.view(len(self.bias), -1, taps)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} taps of this CKConv's kernels")
        with torch.autocast(x.device.type, enabled=False):
            # one product of channels for each frequency
            given = torch.fft.rfft(wide(x), 2 * length, dim=1).transpose(0, 1)
            taps = torch.fft.rfft(wide(self.kernel(length)), 2 * length).permute(2, 1, 0)
            y = torch.fft.irfft((given @ taps).transpose(0, 1), 2 * length, dim=1)[:, :length]
        return y.to(x.dtype) + self.bias

    def cost(self, length: int) -> Cost:
        d_out = len(self.bias)
        d_in = self.Kernel.last.weight_v.shape[0] // d_out
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        product = 8.0 * (length + 1) * d_in * d_out  # complex: four real multiply-adds
        work = Cost(product, transform * (d_in + d_out) + float(length * d_out))
        return work + (self.Kernel.cost(length) + Cost(other=transform * d_in * d_out)).per_batch


class CKBlock(nn.Module):
    """x -> relu(x + h), h = relu(norm(conv(relu(norm(conv(x)))))): (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, dropout: float, kernel: Mapping[str, Any]) -> None:
        super().__init__()
        self.cconv1, self.norm1 = CKConv1d(d_model, d_model, **kernel), LayerNorm(d_model)
        self.cconv2, self.norm2 = CKConv1d(d_model, d_model, **kernel), LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(F.relu(self.norm1(self.cconv1(x))))
        h = self.dropout(F.relu(self.norm2(self.cconv2(h))))
        return F.relu(x + h)


class CKMixer(Mixer):
    """All blocks: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    blocks: Any

    def __init__(self, d_model: int, n_layers: int, dropout: float, kernel: Mapping[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CKBlock(d_model, dropout, kernel) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = own_precision(x, partial(block, x))
        return x

    def cost(self, length: int) -> Cost:
        conv = self.blocks[0].cconv1
        return len(self.blocks) * (2 * conv.cost(length) + Cost(other=14.0 * length * len(conv.bias)))


class CKConv(Encoder):
    """kernel_hidden: width of the kernel networks. omega: w, the highest frequency they start with."""

    card = Card(
        title="CKConv: Continuous Kernel Convolution For Sequential Data",
        year=2021,
        url="https://arxiv.org/abs/2102.02611",
        scaling="L log L",
        causal=True,
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        kernel_hidden: int = 32,
        omega: float = 30.0,
    ) -> None:
        super().__init__()
        whole = {"d_model": d_model, "n_layers": n_layers, "length": length, "kernel_hidden": kernel_hidden}
        at_least(1, **whole)
        if omega <= 0:
            raise ValueError(f"omega is {omega}; more than 0")
        known = ("causal", "bidirectional", "concat", "add", "shared")
        one_of(known, direction=direction)
        self.d_model, self.n_layers, self.length, self.direction = d_model, n_layers, length, direction
        kernel = {"length": length, "hidden": kernel_hidden, "omega": omega}

        def make() -> Mixer:
            return CKMixer(d_model, n_layers, dropout, kernel)

        combine = "concat" if direction == "bidirectional" else direction
        self.net = make() if direction == "causal" else Bidirectional(make, d_model, combine)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(*clean_padding(x, mask))

    def cost(self, length: int) -> Cost:
        return self.net.cost(length)
