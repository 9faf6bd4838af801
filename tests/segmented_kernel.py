"""Run one recurrence through Triton's interpreter in 1 to 8 segments, as a GPU with idle processors would, and print
its errors as JSON, by case and number of segments.

A process of its own, because TRITON_INTERPRET has to be set before Triton is imported:
`TRITON_INTERPRET=1 python tests/segmented_kernel.py linear_scan`.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch

from lra.kernels import _split
from lra.kernels._case import Case
from lra.kernels.decay_attention.cases import _inputs as attention
from lra.kernels.delta_rule.cases import _inputs as delta
from lra.kernels.linear_scan.cases import _inputs as linear
from lra.kernels.selective_scan.cases import _inputs as selective
from lra.kernels.wkv.cases import _inputs as wkv
from lra.operators.parity import errors_of

COUNTS = (1, 2, 3, 5, 8)
LENGTH = 125  # eight tiles of the interpreter, the last one not full
# few channels: the interpreter scans one number at a time
MAKE = {
    "linear_scan": {
        "initial state": linear(2, LENGTH, 1, h0=True),
        "reverse": linear(1, LENGTH, 2, h0=True, reverse=True),
        "shared complex": linear(2, LENGTH, 1, complex_=True, shared=True, reverse=True),
    },
    "selective_scan": {
        "state in and out": selective(2, LENGTH, 1, 2, options="Dzh"),
        "bare": selective(1, LENGTH, 2, 1),
    },
    "wkv": {
        "state in and out": wkv(2, LENGTH, 1, state=True, return_state=True, rate=-3.0),
    },
    "decay_attention": {
        "step": attention(1, LENGTH, 2, 3, 2, chunk=16, state=True, return_state=True),
        "channel": attention(1, LENGTH, 2, 3, 17, "channel", chunk=16, state=True, return_state=True),
    },
    "delta_rule": {
        "gated": delta(1, LENGTH, 2, 3, 17, chunk=16, state=True, return_state=True),
        "ungated": delta(1, LENGTH, 1, 17, 3, gated=False, chunk=16),
    },
}


def main(op: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, make in MAKE[op].items():
        for count in COUNTS:
            with mock.patch.object(_split, "segments", side_effect=lambda *_, count=count: count) as asked:
                found[f"{name}, {count}"] = errors_of(op, Case(name, "edge", make), torch.float32, impl="gpu")
            assert asked.called
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
