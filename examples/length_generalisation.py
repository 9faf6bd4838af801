# %% [markdown]
# # Length generalisation of five models
#
# A protocol may name test splits that are longer than the training sequences. Every run is scored on them too. `parity`
# trains on up to 40 bits and tests on up to 256.

# %%
import altair as alt
import pandas as pd

import lra

MODELS = ("elman", "gru", "mingru", "linear_transformer", "transformer")
SHORT = {
    "train.steps": 60, "train.evaluate_every": 30, "search.rates": [], "optim.lr": 3e-3, "model.d_model": 16,
    "data.validation_examples": 64, "data.test_examples": 64,
}  # fmt: skip

# %% [markdown]
# The overrides make a run of seconds out of one of minutes, so these numbers say nothing about the models. Without them
# the recipe `diagnostic` gives all models the same steps, examples and search for the learning rate.

# %%
rows = []
for model in MODELS:
    record = lra.train("parity", model, recipe="diagnostic", overrides=SHORT).record
    for score in (record.test, *record.tests.values()):
        rows.append({"model": model, "length": score.length, "right": 100 * score.positions})
table = pd.DataFrame(rows)
print(table.pivot(index="model", columns="length", values="right").round(1))

# %% [markdown]
# A guess is right at half of the positions. `lra report` draws the same chart for all diagnostic results on file.

# %%
chart = (
    alt.Chart(table)
    .mark_line(point=True)
    .encode(
        x=alt.X("length", scale=alt.Scale(type="log", base=2), title="test length"),
        y=alt.Y("right", scale=alt.Scale(domain=[40, 100]), title="right positions %"),
        color="model",
    )
)
chart.save("lengths.svg")
