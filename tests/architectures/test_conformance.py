"""Every registered architecture passes the conformance checks, and every check bites."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bad_encoders
import pytest
import torch
from rich.console import Console

from lra.conformance.checks import LONG, growth
from lra.conformance.context import CheckContext, reloaded
from lra.conformance.suite import CHECKS, Finding, check, meaning, render
from lra.encoder import Encoder
from lra.errors import UserError
from lra.registry import Constructor, architectures

HERE = Path(__file__).parents[1]
NAMES = architectures.names(variants=True)
# one fresh process serves all names in a test of its own: starting one for each would cost more than all other checks
IN_PROCESS = [name for name in CHECKS if name != "save"]
# two seconds a name and more: most names are traced in the slow tests
TRACED = ["compiles", "exports"]
OFTEN_TRACED = ("gau", "gru", "s4d")
UNTRACED = [name for name in IN_PROCESS if name not in TRACED]
BROKEN = [
    name for name, c in vars(bad_encoders).items()
    if inspect.isclass(c) and issubclass(c, Encoder) and c.__module__ == "bad_encoders"
]  # fmt: skip


def named(name: str) -> str:
    return f"{HERE / 'bad_encoders.py'}:{name}"


# what a variant can break by itself; the slow tests run every check on it
OWN_OF_A_VARIANT = ("signature", "card", "shape", "padding_row", "causal", "gradients", "step", "cost")
# loops over the tokens or within one: the checks of these take over ten seconds
SLOW = (
    "cfc/ltc", "cfc/mixed-memory", "cfc/no-gate", "cfc/pure", "delta_elman/step4", "dnc", "log_elman", "lstm/zoneout",
    "mesa", "neural_ode", "neural_ode/euler", "neural_ode/midpoint", "ntm",
)  # fmt: skip


def passes(name: str, checks: list[str]) -> None:
    findings = check(name, only=checks)
    assert [f.check for f in findings] == checks
    assert not [f"{f.check}: {f.message}" for f in findings if f.failed]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "/" in n or n in SLOW else n for n in NAMES]
)
def test_architecture(name: str) -> None:
    passes(name, UNTRACED)


@pytest.mark.parametrize("name", [n for n in NAMES if "/" in n and n not in SLOW])
def test_a_variant_passes_the_checks_that_it_alone_can_break(name: str) -> None:
    chosen = [check for check in UNTRACED if check in OWN_OF_A_VARIANT]
    assert len(chosen) == len(OWN_OF_A_VARIANT), "a check of that name does not exist"
    passes(name, chosen)


@pytest.mark.parametrize("name", [n if n in OFTEN_TRACED else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_architecture_is_compiled_and_exported(name: str) -> None:
    assert not [f"{f.check}: {f.message}" for f in check(name, only=TRACED) if f.failed]


@pytest.mark.parametrize(
    ("name", "options", "scaling"),
    [
        ("cdil", {"levels": 3}, "L"),
        ("tcn", {"levels": 3}, "L"),
        ("mega", {"chunk": 16}, "L log L"),
        ("reformer", {"n_buckets": 64}, "L log L"),
        ("sinkhorn", {"size": 16}, "L^2"),
        ("sparse", {"stride": 16}, "L^2"),
        ("sparse", {"stride": 16, "pattern": "fixed"}, "L^2"),
    ],
)
def test_what_no_longer_follows_the_length_grows_otherwise(name: str, options: dict[str, Any], scaling: str) -> None:
    built = CheckContext(architectures.get(name), options).encoder()
    assert built.scaling == scaling != built.card.scaling
    assert [f.status for f in check(name, only=["cost"], options=options)] == ["pass"]


@pytest.mark.parametrize(
    ("scaling", "term"),
    [
        ("L", lambda n: 0.0),
        ("L log L", lambda n: n * math.log(n)),
        ("L sqrt L", lambda n: n * math.sqrt(n)),
        ("L^2", lambda n: n**2),
    ],
)
def test_growth_is_that_of_the_fastest_part(scaling: str, term: Callable[[int], float]) -> None:
    """A hundredth of the work at the shortest length, beside fixed and linear work."""
    first = LONG[0]
    share = 0.01 * first / max(term(first), 1.0)
    assert growth([5 * first + n + share * term(n) for n in LONG]) == scaling


def test_growth_of_another_kind_is_named_as_such() -> None:
    for work in (lambda n: n**0.5, lambda n: n * (100 - math.log(n)), lambda n: n**3):
        assert growth([work(n) for n in LONG]) == "none of L, L log L, L sqrt L, L^2"


@pytest.mark.parametrize("variants", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["names", "variants"])
def test_architectures_reload_in_a_fresh_process(variants: bool) -> None:
    names = [name for name in NAMES if ("/" in name) == variants]
    subjects = [CheckContext(architectures.get(name)) for name in names]
    faults = dict(zip(names, reloaded(subjects), strict=True))
    exempt = {name for name, subject in zip(names, subjects, strict=True) if "save" in subject.card.exempt}
    assert {name: fault for name, fault in faults.items() if fault and name not in exempt} == {}
    assert {name for name in exempt if "/" not in name and not faults[name]} == set(), "exemptions no longer needed"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_encoder_fails_the_named_check_alone(name: str) -> None:
    breaks = getattr(bad_encoders, name).breaks
    findings = check(named(name), only=IN_PROCESS if breaks in TRACED or name == "Good" else UNTRACED)
    assert {f.check: f.message for f in findings if f.failed}.keys() == ({breaks} if breaks in IN_PROCESS else set())
    assert all("\n" not in f.message for f in findings)


def test_broken_encoders_in_a_fresh_process() -> None:
    names = [name for name in BROKEN if name != "CannotBeBuilt"]
    faults = reloaded([CheckContext(architectures.get(named(name))) for name in names])
    wanted = {name for name in names if getattr(bad_encoders, name).breaks == "save"}
    assert {name for name, fault in zip(names, faults, strict=True) if fault} == wanted


def test_every_check_is_bitten() -> None:
    assert {getattr(bad_encoders, name).breaks for name in BROKEN} - {""} == set(CHECKS)


def test_exemptions_are_strict() -> None:
    [honest] = check(named("HonestExemption"), only=["padding"])
    assert (honest.status, honest.message, honest.failed) == ("exempt", "it reads the padding", False)
    [stale] = check(named("StaleExemption"), only=["padding"])
    assert (stale.status, stale.failed) == ("stale", True)
    assert "delete the exemption" in stale.message
    # with other arguments than the card speaks of, an exemption may well not be needed
    [other] = check(named("StaleExemption"), only=["padding"], options={"n_layers": 1})
    assert other.status == "pass"


def test_an_exemption_may_be_that_of_one_variant() -> None:
    """The others must pass; the variant must fail."""
    for name, status in (("hyena", "pass"), ("hyena/order3", "exempt")):
        assert [f.status for f in check(name, only=["magnitudes"])] == [status]

    class Stale(bad_encoders.Good):
        card = replace(bad_encoders.CARD, variants={"two": {}}, exempt={"two/padding": "it reads the padding"})

    for name, status in (("stale", "pass"), ("stale/two", "stale")):
        assert [f.status for f in check(Constructor(name, Stale), only=["padding"])] == [status]


def test_an_exemption_names_a_variant_that_exists() -> None:
    class Wrong(bad_encoders.Good):
        card = replace(bad_encoders.CARD, variants={"two": {}}, exempt={"tow/padding": "it reads the padding"})

    [found] = check(Constructor("file.py:Wrong", Wrong), only=["card"])
    assert found.failed
    assert "unknown variant 'tow'; did you mean 'two'?" in found.message


def test_weight_decay_is_left_to_the_recipe_without_a_recurrence() -> None:
    """LRA's own optimiser decays every parameter of its Transformers."""
    assert [f.status for f in check("transformer", only=["optim_groups", "optim_norms"])] == ["pass", "pass"]
    assert [f.status for f in check("s4d", only=["optim_groups", "optim_norms"])] == ["pass", "exempt"]
    assert [f.status for f in check("mamba", only=["optim_groups", "optim_norms"])] == ["pass", "pass"]


def test_messages_say_what_is_wrong() -> None:
    for name, said in (
        ("ReadsPadding", "your layer reads padded positions; take the argument `mask`"),
        ("DeadParameter", "1 of 14 parameters get no gradient: unused"),
        ("LeaksOnTheWayBack", "with direction='bidirectional' outputs at real positions changed by"),
        ("StepsDifferently", "at token 1 (float64)"),
        ("DoubledCost", "cost(32).of_batch(1).matmul is 524,288, 2 times what was counted in matrix products: 262,144"),
        ("ForgetsBetweenChunks", "chunk starts from the state or leaves it wrongly"),
        ("ChargedToEverySequence", "declares 0 as done once for a batch; counted were 2,621,440 of"),
        ("OverstatedGrowth", "work is declared to grow as L^2, but cost grows as L"),
        ("DecaysItsSteps", 'a recipe with optim.decay = "all" decays log_dt'),
        ("GrowsWithTheLength", "outputs of sum at 4096 tokens have RMS"),
        ("UnknownExemption", "unknown check 'paddin'; did you mean 'padding'?"),
        ("TakesAnything", "the constructor takes an argument that does not exist; pass on what its ** holds"),
        ("CannotBeBuilt", "its constructor raised RuntimeError: no such thing (bad_encoders.py:"),
    ):
        breaks = getattr(bad_encoders, name).breaks
        [message] = [f.message for f in check(named(name), only=[breaks]) if f.failed]
        assert said in message


def test_only_checks_that_exist() -> None:
    with pytest.raises(UserError, match="unknown check 'pading'; did you mean 'padding'"):
        check("gru", only=["pading"])


def test_checks_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check(named("Good"), only=["shape", "trains"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_table_fits(columns: int) -> None:
    findings = [Finding(name, "pass", meaning(name), 0.1) for name in CHECKS]
    findings += [Finding("padding", "fail", "word " * 60, 1.0), Finding("cost", "undeclared", "x" * 150, 12.0)]
    console = Console(width=columns, file=io.StringIO(), record=True)
    console.print(render(findings))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert lines[-1].startswith(f"{len(findings)} checks: {len(CHECKS)} pass, 1 fail, 1 not declared")
    assert all(any(line.split()[:1] == [name] for line in lines) for name in CHECKS)
    if columns >= 100:
        assert all(any(meaning(name) in line for line in lines) for name in CHECKS), "one line for what passes"
