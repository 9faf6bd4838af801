"""Every registered architecture passes the conformance checks, and every check bites."""

from __future__ import annotations

import inspect
from pathlib import Path

import bad_encoders
import pytest

from lra._subject import Subject, reloaded
from lra.encoder import Encoder
from lra.registry import architectures
from lra.testing import CHECKS, check

HERE = Path(__file__).parent
NAMES = architectures.names(variants=True)
# one fresh process serves all names in a test of its own: starting one for each would cost more than all other checks
IN_PROCESS = [name for name in CHECKS if name != "save"]
BROKEN = [
    name for name, c in vars(bad_encoders).items()
    if inspect.isclass(c) and issubclass(c, Encoder) and c.__module__ == "bad_encoders"
]  # fmt: skip


def named(name: str) -> str:
    return f"{HERE / 'bad_encoders.py'}:{name}"


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    findings = check(name, only=IN_PROCESS)
    assert [f.check for f in findings] == IN_PROCESS
    assert not [f"{f.check}: {f.message}" for f in findings if f.failed]


def test_architectures_reload_in_a_fresh_process() -> None:
    subjects = [Subject(architectures.get(name)) for name in NAMES]
    faults = dict(zip(NAMES, reloaded(subjects), strict=True))
    exempt = {name for name, subject in zip(NAMES, subjects, strict=True) if "save" in subject.card.exempt}
    assert {name: fault for name, fault in faults.items() if fault and name not in exempt} == {}
    assert {name for name in exempt if "/" not in name and not faults[name]} == set(), "exemptions no longer needed"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_encoder_fails_the_named_check_alone(name: str) -> None:
    breaks = getattr(bad_encoders, name).breaks
    findings = check(named(name), only=IN_PROCESS)
    assert {f.check: f.message for f in findings if f.failed}.keys() == ({breaks} if breaks in IN_PROCESS else set())
    assert all("\n" not in f.message for f in findings)


def test_broken_encoders_in_a_fresh_process() -> None:
    names = [name for name in BROKEN if name != "CannotBeBuilt"]
    faults = reloaded([Subject(architectures.get(named(name))) for name in names])
    wanted = {name for name in names if getattr(bad_encoders, name).breaks == "save"}
    assert {name for name, fault in zip(names, faults, strict=True) if fault} == wanted


def test_every_check_is_bitten() -> None:
    assert {getattr(bad_encoders, name).breaks for name in BROKEN} - {""} == set(CHECKS)
