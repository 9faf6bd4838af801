"""A trained run as a folder in the layout of model hubs: config.json, model.safetensors, README.md."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lra import __version__
from lra.errors import UserError
from lra.results import record as records
from lra.results import statistics
from lra.training.trained_run import CONFIG, FORMAT, WEIGHTS, TrainedRun

ARENA = """@inproceedings{tay2021long,
  title={Long Range Arena: A Benchmark for Efficient Transformers},
  author={Tay, Yi and Dehghani, Mostafa and Abnar, Samira and Shen, Yikang and Bahri, Dara and Pham, Philip and
          Rao, Jinfeng and Yang, Liu and Ruder, Sebastian and Metzler, Donald},
  booktitle={International Conference on Learning Representations},
  year={2021},
  url={https://arxiv.org/abs/2011.04006}
}"""


def check(run: TrainedRun, folder: Path) -> None:
    """Raise UserError unless a run can be exported to a folder."""
    if not run.finished:
        raise UserError(f"{run.folder} has no record of a finished run, which the model card needs; finish it first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; give a new folder")


def write(run: TrainedRun, folder: Path) -> Path:
    """Write the three files to `folder`, all or none of them, and return it. Raises UserError."""
    from safetensors.torch import save_file

    check(run, folder)
    weights, shared = distinct(run.model)
    content = config(run) | {"shared": shared}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
        try:
            (temporary / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            (temporary / "README.md").write_text(card(run), encoding="utf-8")
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            temporary.chmod(0o755)
            # an empty folder is replaced
            temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def config(run: TrainedRun) -> dict[str, Any]:
    """The content of config.json: what is needed to build the model again, and the record of the run."""
    return {
        "format": FORMAT,
        "library_name": "lra-suite",
        "lra_version": __version__,
        "architectures": [type(run.model.encoder).__name__],
        "model_type": run.recipe.architecture,
        "task": {
            "name": run.task.name, "protocol": run.protocol.name, "length": run.protocol.length,
            "vocabulary": run.protocol.vocabulary, "channels": run.protocol.channels, "classes": run.task.classes,
        },
        "recipe": run.recipe.as_dict(),
        "structure": run.structure,
        "recipe_hash": run.recipe.hash,
        "seed": run.seed,
        "record": records.to_json(run.record),
    }  # fmt: skip


def card(run: TrainedRun) -> str:
    """README.md: a model card with task, protocol, accuracy, interval, recipe and citation."""
    record, test = run.record, run.record.test
    interval = statistics.of_test_set(test.accuracy, test.n)
    accuracy, low, high = (100 * value for value in (test.accuracy, interval.low, interval.high))
    name, task = run.recipe.architecture, run.task
    about = getattr(type(run.model.encoder), "card", None)
    paper = f"{about.title} ({about.year}), {about.url}" if about is not None and about.url else ""
    lines = [
        "---",
        "library_name: lra-suite",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in ("long-range-arena", task.name, name)),
        "model-index:",
        f"- name: {json.dumps(f'{name} on {task.name}')}",
        "  results:",
        "  - task:",
        "      type: sequence-classification",
        "    dataset:",
        f"      name: {json.dumps(f'{task.title} ({run.protocol.name})')}",
        f"      type: {json.dumps(task.name)}",
        "      split: test",
        "    metrics:",
        "    - type: accuracy",
        f"      value: {test.accuracy:.6f}",
        "---",
        "",
        f"# {name} on {task.title}",
        "",
        "| | |",
        "|---|---|",
        f"| task | {task.title} (`{task.name}`), {task.classes} classes |",
        f"| protocol | `{run.protocol.name}`, length {run.protocol.length:,} |",
        f"| test accuracy | {accuracy:.2f} % of {test.n:,} examples |",
        f"| 95 % interval | {low:.2f} to {high:.2f} % (Wilson, one run) |",
        *([f"| note | {records.AT_CHANCE} |"] if record.at_chance else []),
        f"| architecture | `{name}`, {record.parameters:,} parameters{f': {paper}' if paper else ''} |",
        f"| recipe | `{run.recipe.name}`, hash `{run.recipe.hash[:16]}`, seed {run.seed} |",
        f"| trained with | `{record.command}` |",
        "",
        "## Use",
        "",
        "```python",
        "import lra",
        "",
        'run = lra.load("this folder")',
        'run.predict("test")',
        "```",
        "",
        "## Citation",
        "",
        "```bibtex",
        ARENA,
        "```",
    ]
    return "\n".join(lines) + "\n"


def distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, contiguous, and {name: name under which its tensor is stored}."""
    weights: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            weights[name] = tensor.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format)
    return weights, shared
