"""Runs the decision vectors; their format is in tests/vectors/policy/README.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aa.policy import Policy
from aa.policy.vectors import Case, Vectors, run, vectors
from aa.tomlfile import InvalidFile

FOLDER = Path(__file__).parents[1] / "vectors/policy"
FILES = [vectors(path.read_bytes(), file=path.name) for path in sorted(FOLDER.glob("*.toml"))]
SILENT = {
    "p/lifts",
    "p/www",
    "trial/paths",
    "p/inner-attachments",
    "watching/keys",
    "p/hooks",
    "p/addresses",
    "p/asks",
    "p/a-tool",
    "p/half-shut",
    "p/open",
    "other/also-ask-b",
    "open/home",
}
"""Rules that a vector is about though another rule, or the default, is what decides."""

CASES = [(v, case) for v in FILES for case in v.cases]


def policy(v: Vectors) -> Policy:
    assert v.policy is not None
    return v.policy


@pytest.mark.parametrize(("v", "case"), CASES, ids=[f"{v.file}: {c.name}" for v, c in CASES])
def test_decides_as_the_vector_says(v: Vectors, case: Case) -> None:
    (outcome,) = run(replace(v, cases=(case,)), policy(v))
    assert outcome.differences == {}
    explained = policy(v).explain(case.run, case.action, now=case.now)
    assert explained.decision == outcome.decision
    assert outcome.decision.policy == policy(v).revision


def test_a_wrong_answer_would_be_noticed() -> None:
    v, case = CASES[0]
    for key, wrong in (("effect", "deny"), ("reason", "not there"), ("would", "deny")):
        other = replace(case, expect={**case.expect, key: wrong})
        (outcome,) = run(replace(v, cases=(other,)), policy(v))
        assert outcome.differences.keys() == {key} and not outcome.passed


def test_every_rule_of_the_vectors_decides_somewhere() -> None:
    for v in FILES:
        deciding = {case.expect["rule"] for case in v.cases}
        unused = {rule.ref for rule in policy(v).rules} - deciding
        assert sorted(unused - SILENT) == []


CASE = """
[[case]]
name = "one"
action = { kind = "dns.query", target = "a.example" }
expect = { effect = "deny", rule = "<no-policy>" }
"""


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", ""),
        (CASE + CASE, "case[1].name"),
        (CASE.replace("dns.query", "dns"), "case[0].action"),
        (CASE.replace("expect", "expected"), "case[0].expected"),
        (CASE.replace(', rule = "<no-policy>"', ""), "case[0].expect"),
        (CASE + 'now = "2024-05-06T10:00:00"\n', "case[0].now"),
        (CASE + 'now = "noon"\n', "case[0].now"),
        ('[files]\n"p.toml" = "nonsense"\n' + CASE, ""),
    ],
)
def test_a_file_that_is_not_one_of_vectors_is_refused_by_key(text: str, key: str) -> None:
    with pytest.raises(InvalidFile) as raised:
        vectors(text, file="v.toml")
    assert any(p.key == key and p.file.startswith("v.toml") for p in raised.value.problems)


def test_a_case_has_the_run_and_the_moment_that_it_names() -> None:
    written = CASE + 'now = "2024-05-06T10:00:00+02:00"\nrun = { agent = "a", tags = ["t"] }\n'
    (case,) = vectors(written, file="v.toml").cases
    assert case.now == 1714982400.0
    assert (case.run.agent, case.run.tags, case.run.user) == ("a", ("t",), "dev")
    assert case.run.directory == "/home/dev/work"
