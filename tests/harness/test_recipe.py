"""Recipes: layers, origins, types, hashes, and clear refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest

from lra.architectures._stack import Stack
from lra.config import recipe
from lra.config.match import build_on_meta
from lra.config.recipe import Optim
from lra.errors import UserError
from lra.registry import architectures, tasks
from lra.training.construction import build_encoder
from lra.training.request import Request, read, resolve

FILE = """
[default.train]
steps = 10
evaluate_every = 5
[task.listops.train]
steps = 20
[architecture.s4d.encoder]
dt_max = 0.2
[architecture."s4d/inv".encoder]
dt_max = 0.3
[cell.listops.s4d.optim]
lr = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    return str(file)


def test_narrower_layers_win_and_say_so(path: str) -> None:
    found, origin = recipe.resolve(path, "listops", "s4d/inv", {"train.evaluate_every": "7"})
    assert (found.name, found.train.steps, found.train.evaluate_every) == ("mine", 20, 7)
    assert found.encoder == {"dt_max": 0.3}
    assert found.optim.lr == 1.0
    assert isinstance(found.optim.lr, float)
    assert origin["train.steps"] == "mine.toml [task.listops]"
    assert origin["encoder.dt_max"] == "mine.toml [architecture.s4d/inv]"
    assert origin["optim.lr"] == "mine.toml [cell.listops.s4d]"
    assert origin["train.evaluate_every"] == "--set"
    assert origin["model.d_model"] == "built-in default"


def test_another_cell_does_not_see_them(path: str) -> None:
    found, _ = recipe.resolve(path, "text", "gru")
    assert (found.train.steps, found.encoder, found.optim) == (10, {}, Optim())


def test_the_hash_follows_the_content_and_not_the_name(path: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(FILE)
    one, _ = recipe.resolve(path, "listops", "s4d")
    same, _ = recipe.resolve(str(other), "listops", "s4d")
    changed, _ = recipe.resolve(path, "listops", "s4d", {"optim.lr": "0.5"})
    assert one.hash == same.hash != changed.hash
    assert recipe.from_dict(one.as_dict()).hash == one.hash


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("train.step", "5", "did you mean 'train.steps'"),
        ("trian.steps", "5", "did you mean 'train.steps'"),
        ("train.steps", "many", "expected int"),
        ("train.steps", "1.5", "expected int"),
        ("train.steps", "0", "at least 1"),
        ("train.steps", "true", "expected int"),
        ("optim.lr", "-1", "more than 0"),
        ("optim.lr", "nan", "more than 0"),
        ("optim.betas", "[0.9]", "a list of 2"),
        ("optim.betas", "[0.9, 1.5]", "from 0 up to"),
        ("model.dropout", "1.0", "from 0 up to"),
        ("model.pooling", "'avg'", "one of mean"),
        ("model.head", "'deep'", "one of auto, linear, mlp"),
        ("model.head", "'mlp'", "or neither"),
        ("model.head_hidden", "[8]", "or neither"),
        ("model.pair", "'sum'", "one of products, concat, cross, gated"),
        ("model.contrastive", "-1", "at least 0"),
        ("model.temperature", "0.001", "at least 0.01"),
        ("optim.warmup_power", "0.0", "more than 0"),
        ("steps", "5", "unknown setting"),
        ("optim.name", "adamx", "one of adamw"),
        ("optim.ema", "1.0", "from 0 up to"),
        ("optim.decay", "some", "one of matrices, all"),
        ("train.accumulate", "0", "at least 1"),
        ("train.checkpointing", "1", "expected bool"),
        ("train.curriculum_length", "64", "go together"),
        ("pretrain.objective", "mml", "one of none, mlm, causal"),
        ("pretrain.mask", "0.0", "between 0 and 1"),
        ("expected.accuracy", "0.5", "unknown setting"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(setting: str, value: str, message: str, path: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        recipe.resolve(path, "listops", "s4d", {setting: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[default.train]\nsteps = ", "not valid TOML"),
        ("[defualt.train]\nsteps = 1", "did you mean 'default'"),
        ("[default.trian]\nsteps = 1", "did you mean 'train'"),
        ("[default]\ntrain = 3", "unknown section"),
        ("[default.train]\nstep = 1", "did you mean 'train.steps'"),
        ("\xff", "not valid TOML"),
        ("[[task]]\n" + ".".join("a" * 900) + " = 1", "task.listops is .*; expected a table"),
        ("[default.train]\nsteps" + ".a" * 900 + " = 1", "unknown key 'train.steps.a.*; "),
    ],
)
def test_a_wrong_file_is_one_clear_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        recipe.resolve(str(file), "listops", "s4d")
    assert len(str(error.value)) < 1000


def test_a_number_is_taken_where_a_name_can_be_one() -> None:
    assert recipe.resolve("quick", "listops", "gru", {"train.precision": "32"})[0].train.precision == "32"
    with pytest.raises(UserError, match=r"precision is '31'"):
        recipe.resolve("quick", "listops", "gru", {"train.precision": "31"})


def test_unknown_recipes_and_encoder_keys_get_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'quick'"):
        recipe.resolve("quik", "listops", "gru")
    with pytest.raises(UserError, match=r"did you mean 'encoder\.n_heads'"):
        resolve(Request("listops", "transformer", "quick", settings={"encoder.n_head": "2"}))


OWN = recipe.OF_FAMILY.values()
CELLS = [
    (name, task) for name in recipe.names() for task in tasks.names()
    if not name.startswith("paper/") and (name if name in OWN else None) == recipe.OF_FAMILY.get(tasks.family(task))
]  # fmt: skip


@pytest.mark.parametrize(("name", "task"), CELLS)
def test_every_recipe_resolves_for_every_cell(name: str, task: str) -> None:
    for architecture in architectures.names():
        found, origin = read(Request(task, architecture, name))
        assert found.train.steps >= found.train.evaluate_every, architecture
        assert all(source for source in origin.values()), architecture


@cache
def active_parameters(name: str, recipe_name: str) -> int:
    found, _ = resolve(Request("image", name, recipe_name))
    assert found.model.d_model % found.model.width_step == 0
    return build_on_meta(lambda: build_encoder(found, architectures.get(name), 1024)).active_parameters


# L x L logits, or a map of positions for each head and layer, exceed the budget at any width
TOO_LARGE = {"standard": {"synthesizer/random", "linformer/unshared"}, "matched": {"synthesizer/random"}}


@pytest.mark.parametrize("recipe_name", TOO_LARGE)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "/" in n else n for n in architectures.names(variants=True)]
)
def test_recipes_with_a_budget_stay_within_it(name: str, recipe_name: str) -> None:
    if name in TOO_LARGE[recipe_name]:
        with pytest.raises(UserError, match="parameters at its narrowest"):
            resolve(Request("image", name, recipe_name))
        return
    assert active_parameters(name, recipe_name) <= 1.1 * active_parameters("transformer", recipe_name)


@pytest.mark.parametrize("recipe_name", ["standard", "matched"])
@pytest.mark.parametrize(("name", "deeper"), [("s4d", True), ("lru", True), ("gru", False), ("transformer", False)])
def test_an_architecture_of_small_blocks_gets_as_many_as_meet_the_budget(
    name: str, deeper: bool, recipe_name: str
) -> None:
    resolved, origin = resolve(Request("image", name, recipe_name))
    plain = resolved.model.n_layers
    assert plain <= resolved.n_layers <= resolved.model.max_layers
    assert (resolved.n_layers > plain) == deeper
    assert ("depth" in origin) == ((resolved.d_model, resolved.n_layers) != (resolved.model.d_model, plain))
    if deeper and resolved.n_layers < resolved.model.max_layers:
        sizes = [
            build_on_meta(lambda: build_encoder(r, architectures.get(a), 1024)).active_parameters  # noqa: B023
            for a, r in (
                ("transformer", resolve(Request("image", "transformer", recipe_name))[0]),
                (name, replace(resolved, depth=resolved.n_layers + 1)),
            )
        ]
        assert sizes[1] > resolved.model.budget * sizes[0]


@pytest.mark.parametrize("recipe_name", ["standard", "matched"])
@pytest.mark.parametrize(
    "name", ["moe", "moe/k1", "moe/k4", "switch", "gshard", "gumbel", "expert_choice", "deepseek_moe"]
)
def test_a_mixture_does_the_work_of_the_feed_forward_part_it_replaces(name: str, recipe_name: str) -> None:
    work = []
    for architecture in ("transformer", name):
        found, _ = resolve(Request("image", architecture, recipe_name))
        constructor = architectures.get(architecture)
        encoder = build_on_meta(lambda: build_encoder(found, constructor, 1024))  # noqa: B023
        assert isinstance(encoder, Stack)
        work.append(sum(layer.ffn.cost(1024).matmul for layer in encoder.blocks if layer.ffn is not None))
    assert 0.95 < work[1] / work[0] < 1.1


def test_committed_results_keep_their_recipe_identity() -> None:
    from lra.results import result

    # results live beside the package in a checkout, whatever LRA_RESULTS says while tests run
    files = sorted((Path(recipe.__file__).parents[2] / "results" / "runs").rglob("*.json"))
    for file in files:
        record = result.read(file)
        assert recipe.from_dict(msgspec.to_builtins(record.recipe)).hash == record.recipe_hash, file.name
    assert files


def test_pretraining_settings_count_only_when_there_is_pretraining(path: str) -> None:
    plain, _ = recipe.resolve(path, "listops", "s4d")
    idle, _ = recipe.resolve(path, "listops", "s4d", {"pretrain.steps": "7"})
    used, _ = recipe.resolve(path, "listops", "s4d", {"pretrain.steps": "7", "pretrain.objective": "mlm"})
    assert plain.hash == idle.hash != used.hash
    assert (plain.regime, used.regime) == ("scratch", "self-pretrained (mlm)")
    assert recipe.from_dict(used.as_dict()).hash == used.hash


STATED = """
[default]
source = "the paper"
differences = ["one"]
[default.optim]
lr = 0.1
clip = 0.0
[default.sources]
optim.clip = "ours"
[task.listops]
differences = ["two"]
[task.listops.optim]
clip = 1.0
[task.text]
source = "its file"
[task.text.optim]
clip = 1.0
"""


def test_a_recipe_states_the_source_of_each_value_and_what_differs(tmp_path: Path) -> None:
    stated, silent = tmp_path / "stated.toml", tmp_path / "silent.toml"
    stated.write_text(STATED)
    silent.write_text("[default.optim]\nlr = 0.1\nclip = 0.0\n")
    image, listops, text = (recipe.provenance(str(stated), task, "s4d") for task in ("image", "listops", "text"))
    assert image == recipe.Provenance({"optim.lr": "the paper", "optim.clip": "ours"}, ("one",))
    # a value without a source does not inherit that of the value it replaces
    assert listops == recipe.Provenance({"optim.lr": "the paper"}, ("one", "two"))
    assert text.sources == {"optim.lr": "the paper", "optim.clip": "its file"}
    assert recipe.provenance(str(silent), "image", "s4d") == recipe.Provenance({}, ())
    hashes = [recipe.resolve(str(path), "image", "s4d")[0].hash for path in (stated, silent)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[default.sources]\noptim.lr = 'x'\n[default.optim]\nclip = 0.0",
            "did you mean 'sources.optim.clip'|unknown key",
        ),
        ("[default]\nsource = 3", "hold 3; expected a text"),
        ("[default]\nsources = 'x'", "expected a table"),
        ("[default]\ndifferences = 'x'", "expected a list of texts"),
        ("[default]\ndifferences = [1]", "hold 1; expected a text"),
    ],
)
def test_wrong_statements_are_one_clear_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content)
    for call in (recipe.resolve, recipe.provenance):
        with pytest.raises(UserError, match=message) as error:
            call(str(file), "listops", "s4d")
        assert "\n" not in str(error.value)


def test_expectations_are_read_and_are_no_part_of_the_identity(path: str, tmp_path: Path) -> None:
    more = tmp_path / "more.toml"
    more.write_text(FILE + '[task.listops.expected]\naccuracy = 0.5\nsource = "a paper"\nepoch = 3\nby = 0.3\n')
    found, _ = recipe.resolve(str(more), "listops", "s4d")
    assert (found.expected.accuracy, found.expected.epoch, found.expected.by) == (0.5, 3, 0.3)
    assert found.hash == recipe.resolve(path, "listops", "s4d")[0].hash
    more.write_text(FILE + "[task.listops.expected]\naccuracy = 50.0\n")
    with pytest.raises(UserError, match="from 0 to 1"):
        recipe.resolve(str(more), "listops", "s4d")


@pytest.mark.parametrize("recipe_name", ["quick", "standard", "matched", "diagnostic", "language"])
def test_nobody_gets_other_steps_rates_or_examples_than_the_rest(recipe_name: str) -> None:
    families = {"diagnostic": "diagnostics", "language": "language"}
    for task in [name for name in tasks.names() if tasks.family(name) == families.get(recipe_name, "lra")]:
        given = {
            repr((recipe.data, recipe.optim, recipe.search, recipe.train))
            for name in architectures.names()
            for recipe, _ in [read(Request(task, name, recipe_name))]
        }
        assert len(given) == 1, task
