"""Published settings: every file loads, fits its architecture and says what to expect."""

from __future__ import annotations

import math
import re
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lra.cli.app import app
from lra.cli.common import console
from lra.config import match, recipe
from lra.config.sections import Expected
from lra.data import prepared_sets
from lra.errors import UserError
from lra.registry import architectures
from lra.results import literature
from lra.training.construction import build
from lra.training.request import Request, read, resolve

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (recipe.FOLDER / "paper").glob("*.toml"))
TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")


def architecture_of(file: str) -> str:
    """`transformer-rope` is a variant's own file; file names otherwise are architectures."""
    return file.replace("-", "/")


def content(file: str) -> dict[str, Any]:
    return tomllib.loads((recipe.FOLDER / "paper" / f"{file}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES)
def test_every_file_resolves_and_fits_its_architecture(file: str) -> None:
    name = architecture_of(file)
    assert name.partition("/")[0] in architectures.names()
    told = list(content(file)["task"])
    assert set(told) <= set(TASKS)
    for task in told:
        found, origin = resolve(Request(task, name, "paper"))
        assert origin["data.protocol"].startswith(f"{file}.toml")
        assert found.train.steps >= found.train.evaluate_every
        own, protocol = prepared_sets.resolve(task, found.data.protocol)
        assert protocol.name.startswith(("lra2020", "s4"))
        model = match.build_on_meta(partial(build, found, architectures.get(name), own, protocol, 0))
        assert sum(p.numel() for p in model.parameters()) > 1000


@pytest.mark.parametrize("file", FILES)
def test_every_file_names_its_paper_and_every_figure_its_source(file: str) -> None:
    text = (recipe.FOLDER / "paper" / f"{file}.toml").read_text(encoding="utf-8")
    assert re.search(r"arXiv:\d{4}\.\d{5}", text.partition("\n\n")[0])
    for task, table in content(file)["task"].items():
        source = str(table.get("expected", {}).get("source", "arXiv:"))
        assert "arXiv:" in source or re.search(r"\w/\w+ @ [0-9a-f]{7}", source), task


@pytest.mark.parametrize("file", FILES)
def test_every_value_of_every_file_has_a_source(file: str) -> None:
    name = architecture_of(file)
    for task in content(file)["task"]:
        _, origin = read(Request(task, name, "paper"))
        stated = recipe.provenance("paper", task, name)
        values = [key for key, where in origin.items() if where.startswith(f"{file}.toml [") and "expected" not in key]
        assert len(values) > 10
        assert [key for key in values if not stated.sources.get(key)] == [], task
        assert stated.differences, task
        assert len(set(stated.differences)) == len(stated.differences), task


@pytest.mark.parametrize(
    ("task", "architecture", "says"),
    [
        (
            "listops",
            "reformer",
            [
                "reformer.toml [task.listops]: reformer_attention.py: n_hashes x n_buckets = 10 chunks",
                "reformer.toml [default]: create_optimizer in train.py",
                "reformer.toml [task.listops]: ours",
                "differs from its source: scores are multiplied by sqrt(d) there",
            ],
        ),
        (
            "image",
            "local",
            ["differs from its source: blocks are the positions equal modulo the number of blocks there"],
        ),
        ("text", "sparse", ["differs from its source: every head sees both patterns there, always causally"]),
        ("text", "synthesizer", ["differs from its source: the learned logits start Xavier uniform there"]),
        ("pathx", "mega", ["mega.toml [task.pathx]: README.lra.md: --warmup-power"]),
    ],
)
def test_show_prints_sources_and_differences(
    task: str, architecture: str, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 250)
    done = CliRunner().invoke(app, ["show", task, architecture, "--recipe", "paper"])
    assert done.exit_code == 0, done.output
    for text in says:
        assert text in done.output
    if architecture == "reformer":
        # what --set changes has no source in the file
        done = CliRunner().invoke(app, ["show", task, architecture, "--recipe", "paper", "--set", "optim.eps=1"])
        assert done.exit_code == 2
        done = CliRunner().invoke(app, ["show", task, architecture, "--recipe", "paper", "--set", "encoder.chunk=8"])
        assert "= 10 chunks" not in done.output


CENTRED = {"data.protocol": "s4-centred"}
RELU = {"encoder.feature_map": "deterministic"}
BASE_RATE = {"encoder.dt_lr": 0.01, "encoder.ssm_lr": 0.001}
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    # LRA: generalized attention of relu features, of softmax features on ListOps alone
    "performer": {
        "listops": {"encoder.feature_map": "softmax", "encoder.n_features": 2},
        "text": RELU, "retrieval": RELU, "image": RELU, "pathfinder": RELU,
    },
    "linformer": {"text": {"encoder.sharing": "key-value"}},
    "reformer": {"image": {"encoder.qkv_dim": 64}},
    # classifier_head and classifier_head_dual of common_layers.py
    "transformer": {
        "listops": {"model.head_hidden": (1024,), "model.head_activation": "relu", "model.pooling": "cls"},
        "retrieval": {"model.head_hidden": (512, 256), "model.pair": "concat", "model.pooling": "first"},
    },
    "linear_transformer": {"pathfinder": {"data.protocol": "lra2020"}},
    # layer.lr.dt is null
    "s4": {"listops": BASE_RATE, "text": BASE_RATE, "retrieval": BASE_RATE},
    "s4d": {"listops": BASE_RATE, "text": BASE_RATE, "retrieval": BASE_RATE},
    "s5": {
        "listops": {"encoder.opt_config": "BfastandCdecay"}, "text": {"encoder.dt_global": True},
        "pathfinder": CENTRED, "pathx": {"encoder.opt_config": "BandCdecay", **CENTRED},
    },
    "lru": {"pathfinder": CENTRED, "pathx": CENTRED},
    "mega": {
        "text": {"encoder.block.embedding_dropout": 0.1, "model.head_hidden": (256,)},
        "retrieval": {"model.pair": "concat"}, "pathfinder": CENTRED, "pathx": {"optim.warmup_power": 2.0, **CENTRED},
    },
    "dss": {"listops": {"encoder.dt_lr": 0.02, "encoder.dt_lr_scale": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    "file", ["linformer", "local", "longformer", "sinkhorn", "sparse", "synthesizer", "transformer"]
)
def test_attention_dropout_is_that_of_the_released_models(file: str) -> None:
    rates = {task: read(Request(task, file, "paper"))[0].encoder["attention_dropout"] for task in TASKS[:5]}
    assert rates == {"listops": 0.1, "text": 0.1, "retrieval": 0.1, "image": 0.2, "pathfinder": 0.1}


@pytest.mark.parametrize("file", ["bigbird", "performer", "reformer", "linear_transformer"])
def test_these_released_models_discard_the_rate_of_attention_dropout(file: str) -> None:
    assert not any(read(Request(task, file, "paper"))[0].encoder.get("attention_dropout") for task in TASKS[:5])


@pytest.mark.parametrize("file", ["local", "longformer", "sparse", "synthesizer", "transformer"])
def test_black_pixels_are_padding_where_the_released_models_mask_them(file: str) -> None:
    for task in ("image", "pathfinder"):
        assert read(Request(task, file, "paper"))[0].data.protocol == "lra2020-masked"


@pytest.mark.parametrize("file", ["s4", "s4d", "s5", "lru", "dss", "liquid_s4"])
def test_one_mask_drops_a_channel_along_the_length(file: str) -> None:
    for task in content(file)["task"]:
        assert read(Request(task, file, "paper"))[0].encoder["block"]["tie_dropout"], task


@pytest.mark.parametrize(("file", "settings"), RELEASED.items())
def test_settings_follow_the_released_code(file: str, settings: dict[str, dict[str, Any]]) -> None:
    for task, expected in settings.items():
        found, _ = read(Request(task, file, "paper"))
        for key, value in expected.items():
            part: Any = found
            for name in key.split("."):
                part = part[name] if isinstance(part, dict) else getattr(part, name)
            assert part == value, (task, key)


@pytest.mark.parametrize(
    ("task", "architecture", "says"),
    [
        ("listops", "s4", ["59.60 %", "58.35 to 59.60 %", "50 % on validation after epoch 10", "0.01"]),
        ("image", "transformer", ["42.44 %", "lra2020"]),
        ("text", "transformer/rope", ["79.08 %", "transformer-rope.toml"]),
        ("listops", "mega", ["63.14 %", "no other published figure is known"]),
        ("listops", "mega/chunk", ["58.76 %", "MEGA-chunk"]),
        ("listops", "mamba", ["38.02 %", "32.50 to 44.86 %"]),
        ("image", "s4d", ["87.83 %", "87.83 to 88.19 %"]),
    ],
)
def test_show_prints_what_to_expect(task: str, architecture: str, says: list[str]) -> None:
    done = CliRunner().invoke(app, ["show", task, architecture, "--recipe", "paper"])
    assert done.exit_code == 0, done.output
    for text in says:
        assert text in done.output


def test_an_architecture_without_published_settings_is_told_which_there_are() -> None:
    done = CliRunner().invoke(app, ["show", "listops", "gru", "--recipe", "paper"])
    assert done.exit_code == 2
    assert "s4d" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("file", FILES)
def test_reported_ranges_hold_every_comparable_figure_on_file(file: str) -> None:
    rows = [row for row in literature.load(ROOT / "results") if row.name == architecture_of(file)]
    for task, table in content(file)["task"].items():
        # a table that only collects others' figures is no source
        found = [
            row.values[task] / 100 for row in rows
            if task in row.values and task not in row.not_comparable and "collected" not in row.note
        ]  # fmt: skip
        for accuracy in found:
            if not math.isnan(accuracy):
                expected = table["expected"]
                assert expected["low"] - 1e-9 <= accuracy <= expected["high"] + 1e-9, (task, accuracy)


def test_a_variant_is_itself_under_published_settings() -> None:
    found = {name: resolve(Request("image", name, "paper"))[0] for name in ("s4d", "s4d/inv", "s4d/lin")}
    assert [recipe.encoder["init"] for recipe in found.values()] == ["inv", "inv", "lin"]
    assert found["s4d/inv"].expected == found["s4d"].expected != found["s4d/lin"].expected
    llama, origin = resolve(Request("image", "transformer/llama", "paper"))
    assert llama.encoder["block"] == {"expand": 2.6875, "norm": "rms", "ffn": "swiglu", "embedding_dropout": 0.3}
    assert origin["encoder.block.norm"] == "variant"
    # what is expected of the plain architecture is not expected of another
    assert llama.expected == Expected()


@pytest.mark.parametrize("name", sorted(FILES))
def test_published_settings_are_in_float32(name: str) -> None:
    """With "auto" they would compute in bfloat16 where the hardware does."""
    for task in content(name)["task"]:
        assert read(Request(task, architecture_of(name), "paper"))[0].train.precision == "32", task


@pytest.mark.parametrize("name", [n for n in architectures.names(variants=True) if "/" in n])
def test_no_recipe_turns_a_variant_into_something_else(name: str) -> None:
    for kind in ("quick", "matched", *(["paper"] if name.partition("/")[0] in FILES else [])):
        for task in TASKS:
            found, _ = read(Request(task, name, kind))
            for key, value in architectures.declaration(name).preset.items():
                if key in found.encoder and isinstance(value, dict):
                    assert value.items() <= found.encoder[key].items()
                elif key in found.encoder:
                    assert found.encoder[key] == value


def test_a_setting_that_contradicts_a_variant_is_one_line() -> None:
    with pytest.raises(UserError, match=r"encoder.init is 'inv' \(--set\), but s4d/lin sets it to 'lin'"):
        resolve(Request("image", "s4d/lin", "paper", settings={"encoder.init": "inv"}))
    found, _ = resolve(Request("image", "s4d/lin", "paper", settings={"encoder.init": "lin"}))
    assert found.encoder["init"] == "lin"
