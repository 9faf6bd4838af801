"""The reference pages, generated from the registry, the docstrings, the recipes and the command line."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import samples
from docstrings import code, markdown, prose, table, toctree
from typer.main import get_command

import lra
from benchmarks import families
from lra import registry
from lra.cli.app import app
from lra.config import recipe as recipes
from lra.conformance import suite
from lra.operators import operators
from lra.reports import efficiency, leaderboard
from lra.reports import table as tables
from lra.reports.ranking import Leaderboard
from lra.results import literature, recall, record
from lra.results.collection import Collection
from lra.results.profile import Profile

ROOT = Path(__file__).parents[1]
COMMON = ("d_model", "n_layers", "length", "dropout")
"""Constructor arguments of every encoder."""
DIRECTIONS = {"either": "either, as the recipe chooses", "causal": "causal", "two-way": "bidirectional"}
CONTRACTS = (
    "lra.encoder:Encoder", "lra.encoder:Mixer", "lra.encoder:Card", "lra.encoder:Cost", "lra.encoder:Published",
    "lra.architectures._stack:Block", "lra.task:Task", "lra.task:Protocol", "lra.task:Split",
    "lra.attention:MultiHeadAttention", "lra.attention:CrossAttention", "lra.attention:KVCache",
)  # fmt: skip
RETURNED = (
    "lra.data.examples:LoadedTask", "lra.data.examples:Examples", "lra.training.trained_run:Evaluation",
    "lra.reports.comparison:Comparison", "lra.model:Batch",
)  # fmt: skip
"""What functions of the API return."""


def pages() -> dict[str, str]:
    """Every reference page: path inside the site -> Markdown."""
    return {
        "reference/index.md": _index(),
        **_architectures(), **_tasks(), **_operators(),
        "reference/api.md": _api(), "reference/commands.md": _commands(), "reference/recipes.md": _recipes(),
        "reference/record.md": _record(), "reference/checks.md": _checks(), "reference/published.md": _published(),
    }  # fmt: skip


def _index() -> str:
    contents = {
        "architectures/index": "card, equations, initialisation and options of every architecture",
        "tasks/index": "data and protocols of every task",
        "operators/index": "formula, shapes and definition of every operator",
        "api": "functions and classes of Python",
        "commands": "the command line",
        "recipes": "what each recipe is for, and where its settings come from",
        "checks": "what `lra check` checks",
        "record": "the fields of a result",
        "published": "published accuracies with their sources",
    }
    lines = [f"- [{name.partition('/')[0].capitalize()}]({name}.md): {text}" for name, text in contents.items()]
    return "\n".join(["# Reference", "", *lines, "", toctree(contents)]) + "\n"


def own(names: registry.Registry) -> list[str]:
    """Registered names of this project: what other installed packages register is not part of its documentation."""
    return [name for name in names.names() if names.family(name) != registry.PLUGIN]


def _architectures() -> dict[str, str]:
    reported, profiles = literature.load(ROOT / "results"), efficiency.load(ROOT / "results")
    recalled, steps = recall.read(ROOT / "results"), families.read(ROOT / "results").set_index("architecture")
    names = own(registry.architectures)
    found, rows = {}, []
    for name in names:
        facts = registry.architectures.facts(name)
        cells = [p for p in efficiency.measured(profiles) if p.cell.architecture.partition("/")[0] == name]
        measured = [
            ("first-token recall", _recall(recalled[name]) if name in recalled else ""),
            ("training step", _step(steps.loc[name]) if name in steps.index else ""),
        ]
        found[f"reference/architectures/{name}.md"] = _architecture(name, facts, reported, cells, measured)
        rows.append([
            f"[{name}]({name}.md)", facts["family"].replace("_", " "), prose(facts["title"]), str(facts["year"]),
            facts["scaling"], facts["direction"], "yes" if facts["recurrent"] else "",
        ])  # fmt: skip
    rows.sort(key=lambda row: row[1])
    columns = ("name", "family", "paper", "year", "work", "direction", "recurrent mode")
    found["reference/architectures/index.md"] = "\n\n".join([
        "# Architectures",
        f"{len(names)} architectures. The family is the folder below `architectures/`. Work is that of one forward "
        "pass as the sequence length L grows. A direction of `either` means that the recipe chooses between causal "
        "and bidirectional. An architecture with a recurrent mode can process a sequence token by token "
        "(`init_state`, `step`, `chunk`).",
        table(columns, rows),
        toctree(names),
    ])  # fmt: skip
    return found


def _architecture(
    name: str, facts: dict[str, Any], reported: list[literature.Reported], profiles: list[Profile],
    measured: list[tuple[str, str]],
) -> str:  # fmt: skip
    path = ROOT / "architectures" / facts["family"] / f"{name}.py"
    parity = ROOT / "tests" / "architectures" / f"test_parity_{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    encoder = next(node for node in tree.body if isinstance(node, ast.ClassDef) and _has_card(node))
    published = [recipe for recipe in recipes.names() if re.fullmatch(f"paper/{name}(-.*)?", recipe)]
    card = [
        ("family", facts["family"].replace("_", " ")),
        ("paper", f"[{prose(facts['title'])}]({facts['url']}), {facts['year']}{_bibtex(facts['url'])}"),
        ("work", f"{facts['scaling']} in the sequence length L"),
        ("direction", DIRECTIONS[facts["direction"]]),
        ("recurrent mode", "yes" if facts["recurrent"] else "no"),
        ("published settings", ", ".join(f"[{r}](../recipes.md#{_slug(r)})" for r in published) or "none shipped"),
        ("conformance", f"passes every [check](../checks.md){_exempted(facts)}"),
        *measured,
        ("source", f"`{path.relative_to(ROOT)}`"),
        ("compared in", f"`{parity.relative_to(ROOT)}`" if parity.is_file() else ""),
    ]
    card = [row for row in card if row[1]]
    parts = [f"# {name}", table(("", ""), card), "## Definition", markdown(ast.get_docstring(tree)), "## Options"]
    parts += [markdown(ast.get_docstring(encoder)), *_options(name)]
    if facts["variants"]:
        rows = [[f"`{name}/{key}`", _settings(preset)] for key, preset in facts["variants"].items()]
        parts += ["## Variants", table(("name", "options"), rows)]
    if facts.get("exempt"):
        rows = [[f"`{check}`", prose(reason)] for check, reason in facts["exempt"].items()]
        parts += ["## Exempted checks", "`lra check` expects these to fail, for the reason given.",
                  table(("check", "reason"), rows)]  # fmt: skip
    parts += list(_measured(profiles))
    if own_rows := [row for row in reported if row.name == name]:
        parts += ["## Published accuracies", "Copied from the source of each row, not measured here. See "
                  "[published numbers](../published.md).", _reported(own_rows)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _exempted(facts: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in facts.get("exempt") or ())
    return f" but {names}, for [reasons](#exempted-checks)" if names else ""


def _recall(recalled: recall.RecallRecord) -> str:
    return f"{100 * recalled.accuracy:.1f} % of the sequences of {recalled.length} tokens after {recalled.steps:,} " \
        "training steps ([the task](../../faq.md))"  # fmt: skip


def _step(row: pd.Series) -> str:
    return f"{row['ms']:,.0f} ms and {row['mib']:,.0f} MiB at (B, L, D) = (8, 1,024, 128), two layers, float32, on " \
        f"{row['device']}: {row['over_median']:.1f} times the median of its family"  # fmt: skip


def _measured(profiles: list[Profile]) -> Iterator[str]:
    """Time, memory and work of an encoder at each measured length, a table for each shape and machine."""
    if profiles:
        yield "## Measured"
        yield "One forward pass (fwd), one training step and its peak memory (MiB), and one decoded token (decode). " \
            "`make profile` measures them on another machine."  # fmt: skip
    columns = ("architecture", "L", "params", "GFLOP", "fwd ms", "step ms", "decode µs", "MiB")
    for shape, cells in efficiency.by_shape(profiles).items():
        rows = [dict(zip(efficiency.COLUMNS, efficiency.texts(cell), strict=True)) for cell in cells]
        yield f"{prose(efficiency.title(shape))}:"
        yield table(columns, [[row[column] for column in columns] for row in rows])


def _has_card(node: ast.ClassDef) -> bool:
    targets = [line.targets[0] for line in node.body if isinstance(line, ast.Assign)]
    return any(isinstance(target, ast.Name) and target.id == "card" for target in targets)


def _options(name: str) -> Iterator[str]:
    """How to create the encoder, and a table of the constructor arguments that are its own."""
    yield code(f'encoder = lra.create_encoder("{name}", d_model=64, n_layers=2, length=1024)')
    options = registry.architectures.declaration(name).options
    if rows := [[f"`{key}`", f"`{value!r}`"] for key, value in options.items() if key not in COMMON]:
        yield table(("option", "default"), rows)
    yield f"Every encoder also takes {', '.join(f'`{key}`' for key in COMMON)}."


def _bibtex(url: str) -> str:
    number = re.search(r"arxiv\.org/abs/([\d.]+)", url)
    return f" ([BibTeX](https://arxiv.org/bibtex/{number[1]}))" if number else ""


def _settings(values: Any) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in values.items()) or "the defaults"


def _tasks() -> dict[str, str]:
    names = own(registry.tasks)
    rows, found = [], {}
    for name in names:
        task = registry.tasks.get(name)()
        found[f"reference/tasks/{name}.md"] = _task(task)
        first = next(iter(task.protocols.values()))
        rows.append([f"[{name}]({name}.md)", task.title, f"{first.length:,}", str(task.classes),
                     ", ".join(f"`{protocol}`" for protocol in task.protocols)])  # fmt: skip
    found["reference/tasks/index.md"] = "\n\n".join([
        "# Tasks",
        "The first protocol of a task is its default. A protocol freezes the data of a task; results of different "
        "protocols are never ranked together.",
        table(("name", "title", "longest sequence", "classes", "protocols"), rows),
        toctree(names),
    ])  # fmt: skip
    return found


def _task(task: Any) -> str:
    parts = [f"# {task.name}", markdown(inspect.getmodule(type(task)).__doc__)]
    parts += ["## Examples", samples.section(task), "## Protocols"]
    for protocol in task.protocols.values():
        values = f"{protocol.vocabulary} token ids" if protocol.vocabulary else f"{protocol.channels} to a position"
        rows = [
            ("longest sequence", f"{protocol.length:,}"),
            ("input", values),
            ("examples", ", ".join(f"{count:,} {split}" for split, count in protocol.counts.items())),
            ("checkpoint selected on", protocol.selection),
            ("raw data", prose(protocol.raw) or "generated"),
            ("note", prose(protocol.note)),
            *((f"SHA-256 of {split}", f"`{digest}`") for split, digest in protocol.sha256.items()),
        ]
        parts += [f"### {protocol.name}", table(("", ""), [row for row in rows if row[1]])]
        parts += [code(task.command(protocol), "bash")]
    return "\n\n".join(parts) + "\n"


def _operators() -> dict[str, str]:
    found, rows = {}, []
    for op in operators():
        module = importlib.import_module(f"lra.kernels.{op}")
        found[f"reference/operators/{op}.md"] = _operator(op, module)
        flags = ("yes" if flag else "no" for flag in (module.HAS_GPU, module.DETERMINISTIC))
        rows.append([f"[{op}]({op}.md)", prose((module.__doc__ or "").partition("\n")[0]), *flags])
    found["reference/operators/index.md"] = "\n\n".join([
        "# Operators",
        "An operator is a function of tensors with several implementations: `reference` is its definition, `cpu` the "
        "fast path on processors, `gpu` a Triton kernel. `impl=\"auto\"` chooses among them; a fallback warns and is "
        "recorded in the result. A deterministic operator gives the same bits in every run on one machine.",
        table(("name", "what it computes", "Triton kernel", "deterministic"), rows),
        toctree(operators()),
    ])  # fmt: skip
    return found


def _operator(op: str, module: Any) -> str:
    folder = ROOT / "kernels" / op
    parts = [f"# {op}", markdown(module.__doc__)]
    for name in module.__all__:
        parts += [f"## {name}", code(f"{name}{_signature(getattr(module, name))}")]
        parts += [markdown(getattr(module, name).__doc__)]
    parts += ["## Definition", "`reference.py`, which the other implementations are compared with:"]
    parts += [code((folder / "reference.py").read_text(encoding="utf-8"))]
    return "\n\n".join(parts) + "\n"


def _signature(function: Any) -> str:
    """The signature of a function or class; one argument a line where it is longer than a page is wide."""
    signature = inspect.signature(function)
    if inspect.isclass(function):
        signature = signature.replace(return_annotation=signature.empty)
    # annotations are strings, which `str` quotes
    text = re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", str(signature))
    if len(text) < 80:
        return text
    arguments, arrow, answer = text.rpartition(") -> ") if ") -> " in text else (text[:-1], ")", "")
    lines = re.split(r", (?=\*|\w+(?::|=|$|,))", arguments[1:])
    return "(\n    " + ",\n    ".join(lines) + f",\n{arrow}{answer}"


def _api() -> str:
    parts = [
        "# Python API",
        "`import lra` loads neither torch nor pandas; each function imports what it needs. Bad input raises "
        "`lra.UserError` with one line that says what is wrong and what is right.",
        "## Functions",
    ]
    public = {name: getattr(lra, name) for name in sorted({*lra._MODULES, "architectures", "results"})}
    functions = {name: value for name, value in public.items() if not inspect.isclass(value)}
    for name, value in functions.items():
        function = value if inspect.isfunction(value) else getattr(importlib.import_module("lra.api"), name)
        parts += [f"### lra.{name}", code(f"lra.{name}{_signature(function)}"), markdown(function.__doc__)]
    parts += ["## Classes"]
    parts += [text for name in public if name not in functions for text in _class(f"lra.{name}", public[name])]
    for title, references in (("What functions return", RETURNED), ("Contracts", CONTRACTS)):
        parts += [f"## {title}"]
        for target in references:
            module, _, name = target.partition(":")
            parts += _class(f"{module}.{name}", getattr(importlib.import_module(module), name))
    return "\n\n".join(parts) + "\n"


def _class(title: str, cls: Any) -> Iterator[str]:
    """Docstring, constructor, methods and properties of a class, as far as the class itself documents them."""
    yield f"### {title}"
    if "__init__" in vars(cls):
        yield code(f"{cls.__name__}{_signature(cls)}")
    yield markdown(cls.__doc__)
    rows = []
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name[0] == "_" or not inspect.isfunction(function) or not function.__doc__:
            continue
        call = name if isinstance(member, property) else f"{name}({', '.join(_arguments(function))})"
        rows.append([f"`{call}`", markdown(function.__doc__).replace("\n\n", "<br>")])
    if rows:
        yield table(("member", "what it is"), rows)


def _arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def _commands() -> str:
    parts = ["# Command line", "Errors are one line, with exit code 2. `lra COMMAND --help` prints what follows here."]
    parts += list(_command(get_command(app), "lra"))
    targets = re.findall(r"^([a-z0-9-]+): *## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    rows = [[f"`make {name}`", prose(text)] for name, text in targets]
    parts += ["## make", "Most targets of the Makefile are thin wrappers around these commands."]
    parts += [table(("target", "what it does"), rows)]
    return "\n\n".join(parts) + "\n"


def _command(command: Any, path: str) -> Iterator[str]:
    """The sections of a command and of the commands below it."""
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _command(below, f"{path} {name}")
        return
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [_argument(p) if p.required else f"[{_argument(p)}]" for p in shown if p.param_type_name == "argument"]
    yield f"## {path}"
    yield code(" ".join([path, *arguments]), "text")
    yield prose(inspect.cleandoc(command.help or ""))
    rows = [
        [f"`{_argument(p)}`" if p.param_type_name == "argument" else _option(p), prose(getattr(p, "help", "") or "")]
        for p in shown
    ]
    if rows:
        yield table(("argument or option", "what it is"), rows)


def _argument(parameter: Any) -> str:
    return (parameter.metavar or parameter.name.upper()).strip("[].")


def _option(parameter: Any) -> str:
    """Names of an option, the metavariable of its value, and its default where it is not empty."""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    value = f" {parameter.metavar}" if parameter.metavar else ""
    default = parameter.default
    return f"{names}{value}" + (f", default `{default}`" if isinstance(default, str | int) and default else "")


def _recipes() -> str:
    parts = [
        "# Recipes",
        "A recipe holds every setting of a run but its seed. `lra show TASK ARCH --recipe NAME` prints the resolved "
        "values, and where each of them comes from.",
    ]
    for name in recipes.names():
        text = (recipes.FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        content = tomllib.loads(text)
        comment = re.match(r"(?:#.*\n)*", text)
        parts += [f"## {name}", prose(re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE) if comment else "")]
        if not name.startswith("paper/"):
            continue
        layers = {"every task": content.get("default", {})} | content.get("task", {})
        parts += ["Tasks: " + ", ".join(task for task in layers if task != "every task") + "."]
        parts += [_layer(title, layer) for title, layer in layers.items() if layer.keys() & {"source", "differences"}]
    return "\n\n".join(part for part in parts if part) + "\n"


def _layer(title: str, layer: dict[str, Any]) -> str:
    """Source and stated differences of one table of a recipe file, as a list."""
    lines = [f"**{title}**, from {prose(layer['source'])}" if "source" in layer else f"**{title}**"]
    return "\n".join([*lines, "", *(f"- {prose(text)}" for text in layer.get("differences", []))]).strip()


def _record() -> str:
    parts = ["# The record of a run", "`results/schema.json` holds the same as JSON Schema."]
    shapes = [cls for cls in vars(record).values() if inspect.isclass(cls) and cls.__module__ == record.__name__]
    for cls in sorted(shapes, key=lambda cls: cls is not record.RunRecord):
        rows = [[f"`{key}`", f"`{kind}`"] for key, kind in inspect.get_annotations(cls).items()]
        if rows:
            parts += [f"## {cls.__name__}", markdown(cls.__doc__), table(("field", "type"), rows)]
    return "\n\n".join(parts) + "\n"


def _checks() -> str:
    rows = [[f"`{name}`", prose(suite.meaning(name))] for name in suite.CHECKS]
    return "# Checks\n\nWhat `lra check` guarantees of an encoder.\n\n" + table(("check", "meaning"), rows) + "\n"


def _published() -> str:
    collection = Collection.read(ROOT / "results")
    measured = leaderboard.beside(Leaderboard.of(collection))
    beside = tables.markdown_body(measured) if measured else "No official run of an architecture that the literature " \
        "reports is on file yet."  # fmt: skip
    return "\n\n".join([
        "# Published numbers",
        "Every row was copied from the source that it names. Sources differ in data, budgets and selection, so the "
        "rows are not a ranking. `FAIL` is what the source prints.",
        "## Measured beside published", beside,
        "## All rows", _reported(literature.load(ROOT / "results")),
    ]) + "\n"  # fmt: skip


def _reported(rows: list[literature.Reported]) -> str:
    cells = [
        [prose(row.architecture), row.protocol or "not stated",
         *(_percent(row.values.get(task)) for task in literature.TASKS), prose(row.source), prose(row.note)]
        for row in rows
    ]  # fmt: skip
    return table(("architecture", "protocol", *literature.TASKS, "source", "note"), cells)


def _percent(value: float | None) -> str:
    return "-" if value is None else "FAIL" if value != value else f"{value:.2f}"


def _slug(title: str) -> str:
    """The anchor that MyST gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
