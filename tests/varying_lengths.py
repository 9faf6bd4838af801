"""Trains 300 steps on sequences of 500 to 2,000 tokens; prints the resident memory in MiB every 50 steps, as JSON."""

from __future__ import annotations

import json

import numpy as np
import torch

from lra.data.batches import DeviceSet, Sampler
from lra.model import Classifier
from lra.registry import architectures
from lra.task import Protocol, Split

EXAMPLES, STEPS, EVERY = 2000, 300, 50


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    lengths = random.integers(500, 2000, EXAMPLES)
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    split = Split(
        random.integers(0, 15, lengths.sum()).astype(np.uint8), offsets,
        np.arange(EXAMPLES, dtype=np.int32)[:, None], (np.arange(EXAMPLES) % 10).astype(np.uint8),
    )  # fmt: skip
    protocol = Protocol("strict", length=2000, vocabulary=15)
    data = DeviceSet.of(split, protocol, torch.device("cpu"))
    sampler = Sampler(data.lengths, 4, seed=0, window=10)
    model = Classifier(architectures.get("s4d")(d_model=32, n_layers=1, length=2000), protocol, 10, 1, "mean")
    optimiser = torch.optim.AdamW(model.parameters())
    sizes = []
    for step in range(STEPS):
        batch = data.batch(sampler.batch(step))
        torch.nn.functional.cross_entropy(model(batch), batch.labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % EVERY == EVERY - 1:
            sizes.append(round(resident(), 1))
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
