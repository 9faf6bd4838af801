# %% [markdown]
# # A sweep on Ray
#
# A sweep file is a grid. `--ray local` starts a cluster on this machine; `--ray ADDRESS` joins a running one. It needs
# `pip install 'lra-suite[cluster]'`.

# %%
import subprocess
import sys
from pathlib import Path

import lra

TASK = Path(__file__).with_name("custom_task.py")
Path("sweep.toml").write_text(f"""
tasks = ["{TASK}:FirstToken"]
architectures = ["gru", "mingru"]
seeds = [0]
recipe = "quick"

[set]
"train.steps" = 20
"train.evaluate_every" = 20
"model.d_model" = 16
""")

# %% [markdown]
# Each cell is one Ray task. Cells that have a result are skipped, so the same command continues a sweep.

# %%
command = [sys.executable, "-m", "lra.cli", "sweep", "sweep.toml", "--ray", "local", "--no-forecast"]
subprocess.run(command, check=True)
print(lra.results(smoke=True)[["architecture", "seed", "accuracy"]])
