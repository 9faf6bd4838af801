# %% [markdown]
# # Benchmark a layer of your own
#
# Any module from (B, L, D) to (B, L, D) can take part.

# %%
import torch
from custom_task import FirstToken
from torch import nn

import lra


class MeanSoFar(nn.Module):
    """The mean of each token and those before it."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(1))


# %% [markdown]
# `quick` is a smoke test; `recipe="standard"` makes a comparison. The overrides shorten it further.

# %%
SHORT = {"train.steps": 40, "train.evaluate_every": 20, "model.d_model": 16}
run = lra.train(FirstToken, MeanSoFar, recipe="quick", overrides=SHORT)
print(f"{100 * run.accuracy:.1f} % on {run.record.test.n} test examples, {run.record.parameters:,} parameters")
print("without a sequence model:", run.record.floors)
