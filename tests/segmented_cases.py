"""Inputs of recurrences that are cut into segments."""

from __future__ import annotations

from lra.kernels.decay_attention.cases import Make
from lra.kernels.decay_attention.cases import _inputs as attention
from lra.kernels.delta_rule.cases import _inputs as delta
from lra.kernels.linear_scan.cases import _inputs as linear
from lra.kernels.selective_scan.cases import _inputs as selective
from lra.kernels.wkv.cases import _inputs as wkv


def cases(op: str, tiles: int) -> dict[str, Make]:
    """Cases of so many tiles in float32, the last one not full; of three tiles the quickest of each kernel."""
    long, middle, short = 64 * tiles - 3, 32 * tiles - 3, 16 * tiles - 3
    found = {
        "linear_scan": {
            "shared complex": linear(2, middle, 1, complex_=True, shared=True, reverse=True),
            "initial state": linear(2, long, 1, h0=True),
            "reverse": linear(1, long, 2, h0=True, reverse=True),
        },
        "selective_scan": {
            "state in and out": selective(2, short, 1, 2, options="Dzh"),
            "bare": selective(1, short, 2, 1),
        },
        "wkv": {
            "large keys, slow": wkv(1, middle, 2, state=True, return_state=True, spread=10.0, rate=-5.0),
            "state in and out": wkv(2, middle, 1, state=True, return_state=True, rate=-3.0),
        },
        "decay_attention": {
            "one head": attention(1, short, 1, 3, 2, chunk=16, state=True, return_state=True),
            "step": attention(1, short, 2, 3, 2, chunk=16, state=True, return_state=True),
            "channel": attention(1, short, 2, 3, 17, "channel", chunk=16, state=True, return_state=True),
        },
        "delta_rule": {
            "one head": delta(1, short, 1, 3, 2, chunk=16, state=True, return_state=True),
            "gated": delta(1, short, 2, 3, 17, chunk=16, state=True, return_state=True),
            "ungated": delta(1, short, 1, 17, 3, gated=False, chunk=16),
        },
    }[op]
    # complex numbers have kernels of their own
    return dict([*found.items()][: 2 if op == "linear_scan" else 1]) if tiles == 3 else found
