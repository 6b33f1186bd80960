"""The shipped templates: what each allows and denies, and what a run's sandbox is under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aa.model import Rung, Run
from aa.policy import Policy, load
from aa.policy.compile import Share
from aa.policy.enforcement import Host, report
from aa.policy.vectors import Case, Vectors, run, vectors

TOP = Path(__file__).parents[2]
NAMES = ("observe", "coding-agent", "locked-down")
RUN = Run("r", "agent", "dev", 1000)


def template(name: str) -> Policy:
    return load(TOP / f"etc/policies/{name}.toml")


def cases(name: str) -> Vectors:
    path = TOP / f"tests/vectors/templates/{name}.toml"
    return vectors(path.read_bytes(), file=path.name)


CASES = [(name, case) for name in NAMES for case in cases(name).cases]


def test_every_template_that_is_shipped_has_vectors_and_no_other() -> None:
    assert {p.stem for p in (TOP / "etc/policies").glob("*.toml")} == set(NAMES)
    assert {p.stem for p in (TOP / "tests/vectors/templates").glob("*.toml")} == set(NAMES)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}: {c.name}" for n, c in CASES])
def test_a_template_answers_as_its_vector_says(name: str, case: Case) -> None:
    found = cases(name)
    (outcome,) = (o for o in run(found, template(name)) if o.case.name == case.name)
    assert outcome.differences == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_of_a_template_decides_in_a_vector(name: str) -> None:
    policy = template(name)
    assert {r.ref for r in policy.rules} <= {c.expect["rule"] for c in cases(name).cases}


@pytest.mark.parametrize("name", ["coding-agent", "locked-down"])
def test_no_rule_of_a_template_is_only_detected(name: str) -> None:
    """Every pattern of theirs is one that a mount can say."""
    for e in report(template(name).files, Host(Rung.CGROUP, 6, True)):
        assert "detect only" not in e.mechanisms, e.key


def test_the_sandbox_under_each_template() -> None:
    coding, locked = (template(n).compile(RUN).share for n in ("coding-agent", "locked-down"))
    assert {"~/.ssh", "~/.bashrc", "/usr/bin/sudo"} <= {c.path for c in coding.closed}
    assert (
        coding.read_only == locked.read_only == (".envrc", ".git/config", ".git/hooks", ".vscode")
    )
    assert (locked.file, locked.writable) == ("deny", (".",))
    watched = template("observe").compile(RUN).share
    assert watched == Share(writable=watched.writable), "what only observes closes nothing"
