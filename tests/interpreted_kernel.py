"""Run the small and edge cases of one operator through Triton's interpreter and print their errors as JSON.

A process of its own, because TRITON_INTERPRET has to be set before Triton is imported:
`TRITON_INTERPRET=1 python tests/interpreted_kernel.py linear_scan`.
"""

from __future__ import annotations

import json
import sys

import torch

from lra.operators.parity import cases_of, errors_of


def main(op: str) -> None:
    torch.set_num_threads(1)
    chosen = [case for case in cases_of(op, "small", "edge") if case.interpreted]
    print(json.dumps({case.name: errors_of(op, case, torch.float32, impl="gpu") for case in chosen}))


if __name__ == "__main__":
    main(sys.argv[1])
