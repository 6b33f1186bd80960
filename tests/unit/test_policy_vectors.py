"""Runs the decision vectors; their format is in tests/vectors/policy/README.md."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

import pytest

from aa.model import Action, Decision, Run
from aa.policy import Policy, loads

VECTORS = Path(__file__).parents[1] / "vectors/policy"
FILES = sorted(VECTORS.glob("*.toml"))
SILENT = {
    "p/lifts",
    "p/addresses",
    "p/asks",
    "p/a-tool",
    "p/half-shut",
    "p/open",
    "other/also-ask-b",
    "open/home",
}
"""Rules that a vector is about though another rule, or the default, is what decides."""


@functools.cache
def vectors(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


@functools.cache
def policy(path: Path) -> Policy:
    return loads(vectors(path)["files"])


CASES = [(path, case) for path in FILES for case in vectors(path)["case"]]


def run_of(case: dict[str, Any]) -> Run:
    given = case.get("run", {})
    return Run(
        id="r",
        agent=given.get("agent", "agent"),
        user=given.get("user", "dev"),
        uid=1000,
        tags=tuple(given.get("tags", ())),
        home=given.get("home", "/home/dev"),
        directory=given.get("directory", "/home/dev/work"),
    )


def wrong(decision: Decision, expect: dict[str, Any]) -> dict[str, Any]:
    """What of an expectation the decision does not fulfil."""
    found = {
        "effect": decision.effect.value,
        "rule": decision.rule,
        "mode": decision.mode.value,
        "would": decision.would.value if decision.would else None,
    }
    wanted = {"mode": "enforce", "would": None, **expect}
    differ = {key: found[key] for key in found if found[key] != wanted[key]}
    if expect.get("reason", "") not in decision.reason:
        differ["reason"] = decision.reason
    return differ


@pytest.mark.parametrize(
    ("path", "case"), CASES, ids=[f"{path.stem}: {case['name']}" for path, case in CASES]
)
def test_decides_as_the_vector_says(path: Path, case: dict[str, Any]) -> None:
    action = Action.from_json(case["action"])
    p, run = policy(path), run_of(case)
    decision = p.decide(run, action, now=0.0)
    assert wrong(decision, case["expect"]) == {}
    assert p.explain(run, action, now=0.0).decision == decision
    assert decision.policy == p.revision


def test_a_wrong_answer_would_be_noticed() -> None:
    path, case = CASES[0]
    decision = policy(path).decide(run_of(case), Action.from_json(case["action"]), now=0.0)
    assert wrong(decision, {**case["expect"], "effect": "deny"}).keys() == {"effect"}
    assert wrong(decision, {**case["expect"], "reason": "not there"}).keys() == {"reason"}
    assert wrong(decision, {**case["expect"], "would": "deny"}).keys() == {"would"}


def test_names_of_cases_are_unique_and_expectations_complete() -> None:
    for path in FILES:
        cases = vectors(path)["case"]
        assert len({case["name"] for case in cases}) == len(cases)
        for case in cases:
            assert case["expect"].keys() >= {"effect", "rule"}
            assert case.keys() <= {"name", "run", "action", "expect"}


def test_every_rule_of_the_vectors_decides_somewhere() -> None:
    for path in FILES:
        deciding = {case["expect"]["rule"] for case in vectors(path)["case"]}
        unused = {rule.ref for rule in policy(path).rules} - deciding
        assert unused <= SILENT
