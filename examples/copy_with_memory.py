# %% [markdown]
# # Copy with a memory
#
# The input is up to 20 vectors of 8 random bits and a mark. The output is the same vectors, without further input
# (Graves et al. 2014, arXiv:1410.5401, section 4.1). An NTM and a DNC store them in a memory.

# %%
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lra

BITS, LONGEST = 8, 20


class Copier(nn.Module):
    def __init__(self, architecture: str, **options: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(BITS + 1, 64), nn.Linear(64, BITS)
        self.encoder = lra.create_encoder(architecture, d_model=64, n_layers=1, length=2 * LONGEST + 1, **options)

    def forward(self, bits: Tensor) -> Tensor:
        """Bits to copy (batch, n, 8) -> logits of the copy (batch, n, 8)."""
        n = bits.shape[1]
        x = F.pad(bits, (0, 1, 0, n + 1))
        x[:, n, BITS] = 1.0
        y = self.encoder(self.embedding(x), torch.ones(x.shape[:2], dtype=torch.bool))
        return self.head(y[:, -n:])


def train(architecture: str, seed: int, steps: int = 1000, **options: int) -> None:
    """Batches of 1 to `longest` vectors, which grow in number while the loss is small."""
    torch.manual_seed(seed)
    start, model, longest, average, wrong = time.process_time(), Copier(architecture, **options), 3, 1.0, 1.0
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        bits = torch.randint(2, (16, int(torch.randint(longest, ())) + 1, BITS)).float()
        loss = F.binary_cross_entropy_with_logits(model(bits), bits)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 10.0)
        optimiser.step()
        average = 0.95 * average + 0.05 * loss.item()
        longest = min(longest + (average < 0.1), LONGEST)
        if step % 50 == 0 and longest == LONGEST:
            bits = torch.randint(2, (256, LONGEST, BITS)).float()
            with torch.no_grad():
                wrong = ((model(bits) > 0) != bits.bool()).float().mean().item()
            if wrong < 0.005:
                break
    seconds = time.process_time() - start
    print(f"{architecture}: {wrong:.2%} of the bits wrong after {step} steps, {seconds:.0f} CPU seconds")


# %% about one seed in two gets stuck before it has learnt to walk through an NTM's memory
train("ntm", seed=1, slots=32)
train("dnc", seed=0, slots=32, reads=1)
