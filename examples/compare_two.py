# %% [markdown]
# # Compare two architectures
#
# Two runs that were tested on the same examples are compared example by example. The paired test needs far fewer
# examples than two separate intervals.

# %%
from custom_task import FirstToken

import lra

SHORT = {"train.steps": 60, "train.evaluate_every": 30, "model.d_model": 16}
gru = lra.train(FirstToken, "gru", recipe="quick", overrides=SHORT)
transformer = lra.train(FirstToken, "transformer", recipe="quick", overrides=SHORT)

# %% [markdown]
# The difference has a 95 % interval over test examples. It holds for these two trained models; other seeds are other
# models, so a claim about architectures needs several.

# %%
comparison = lra.compare(gru, transformer)
print(comparison)
if comparison.difference is not None:
    print(f"{100 * comparison.difference.mean:+.1f} points, p = {comparison.p:.3g}")

# %% [markdown]
# The settings that differ between the two runs:

# %%
for setting, values in comparison.fields.items():
    print(setting, *values)
