# %% [markdown]
# # Results in pandas, and a figure
#
# `lra.results()` has one row for each run. This script first trains four small runs to draw. Runs of `quick` are smoke
# tests; `smoke=True` selects them.

# %%
import altair as alt
from custom_task import FirstToken

import lra

SHORT = {"train.evaluate_every": 20, "model.d_model": 16}
for architecture in ("gru", "mingru"):
    for steps in (20, 60):
        lra.train(FirstToken, architecture, recipe="quick", overrides=SHORT | {"train.steps": steps})

# %%
runs = lra.results(smoke=True)
runs = runs[runs.task == "first_token"]
print(runs.groupby("architecture")["accuracy"].describe()[["count", "mean", "max"]])

# %% [markdown]
# The chart is interactive in a notebook. PNG, SVG and PDF are written without a browser.

# %%
chart = (
    alt.Chart(runs.assign(percent=100 * runs.accuracy))
    .mark_point(filled=True, size=80)
    .encode(
        x=alt.X("examples", title="training examples"),
        y=alt.Y("percent", title="test accuracy %"),
        color="architecture",
    )
)
chart.save("accuracy.svg")
