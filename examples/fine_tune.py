# %% [markdown]
# # Fine-tune a trained run
#
# `init_from` starts a run with the weights of another one, or of a folder that `lra export` wrote. Tensors are matched
# by name and shape; the record lists those that did not match.

# %%
from custom_task import FirstToken

import lra

SHORT = {"train.steps": 40, "train.evaluate_every": 20, "model.d_model": 16}
first = lra.train(FirstToken, "gru", recipe="quick", overrides=SHORT)
second = lra.train(
    FirstToken, "gru", recipe="quick", seed=1, overrides=SHORT | {"optim.lr": 3e-4}, init_from=first.folder
)
print(f"{100 * first.accuracy:.1f} %, then {100 * second.accuracy:.1f} %; {second.record.regime}")

# %% [markdown]
# A run is loaded from its folder in any later process. Its encoder is a module like any other.

# %%
loaded = lra.load(second.folder, task=FirstToken)
print(loaded.evaluate("validation"))
print(loaded.predict("test")[:5], loaded.features("test").shape)
print(sum(p.numel() for p in loaded.model.encoder.parameters()), "parameters in the encoder")
