# %% [markdown]
# # A task of your own
#
# A task is one class in one file. The label of this one is the first token of a sequence of up to 48 tokens.

# %%
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import lra
from lra.task import SPLITS, Protocol, Split, Task
from lra.tasks.storage import open_split, write_documents, write_examples


class FirstToken(Task):
    """Name the first token."""

    name = "first_token"
    title = "name the first token"
    classes = 4
    protocols: ClassVar = {
        "strict": Protocol("strict", length=48, vocabulary=4, counts={"train": 1024, "validation": 128, "test": 256})
    }

    def prepare(self, folder: Path, protocol: Protocol, **_: Any) -> None:
        for seed, split in enumerate(SPLITS):
            random = np.random.default_rng(seed)
            lengths = random.integers(8, protocol.length + 1, protocol.counts[split])
            documents = [random.integers(0, self.classes, length).astype(np.uint8) for length in lengths]
            write_documents(folder, split, documents)
            write_examples(folder, split, np.array([document[0] for document in documents]))

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def describe(self, split: Split, example: int) -> str:
        return " ".join(map(str, split.document(int(split.index[example, 0]))))


# %% [markdown]
# `lra.load_task` prepares the data once and checks every example.

# %%
if __name__ == "__main__":
    task = lra.load_task(FirstToken)
    print(task.sizes, task.train[0])

# %% [markdown]
# The command line takes it as `examples/custom_task.py:FirstToken`. The other examples use it in place of a task such
# as `"listops"`, because it is ready in a second.
