"""Decision vectors: questions to a policy, each with the answer that it must give. No I/O, no clock.

tests/vectors/policy/README.md describes the format for whoever wants to run them elsewhere.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aa.model import Action, Decision, MalformedValue, Run
from aa.policy.engine import Policy
from aa.policy.load import loads
from aa.tomlfile import Document, InvalidFile, Problem, parse, schema, validate

Json = Any

RUN = {"agent": "agent", "user": "dev", "home": "/home/dev", "directory": "/home/dev/work"}
"""The run of a case, as far as the case does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Case:
    """One question and what is expected of its answer."""

    name: str
    line: int
    run: Run
    action: Action
    now: float
    expect: Mapping[str, Json]

    def differences(self, decision: Decision) -> dict[str, tuple[Json, Json]]:
        """What of the expectation a decision does not fulfil: key -> (expected, found)."""
        found: dict[str, Json] = {
            "effect": decision.effect.value,
            "rule": decision.rule,
            "mode": decision.mode.value,
            "would": decision.would.value if decision.would else None,
        }
        if "obligations" in self.expect:
            found["obligations"] = [o.as_json() for o in decision.obligations]
        wanted = {"mode": "enforce", "would": None, **self.expect}
        differ = {key: (wanted[key], found[key]) for key in found if found[key] != wanted[key]}
        if self.expect.get("reason", "") not in decision.reason:
            differ["reason"] = (self.expect["reason"], decision.reason)
        return differ


@dataclass(frozen=True, slots=True)
class Vectors:
    """A file of cases. `policy` is None where the file has no [files] of its own."""

    file: str
    cases: tuple[Case, ...]
    policy: Policy | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case."""

    case: Case
    decision: Decision
    differences: Mapping[str, tuple[Json, Json]]

    @property
    def passed(self) -> bool:
        return not self.differences


def vectors(content: bytes | str, *, file: str) -> Vectors:
    """Reads a file of cases. Raises InvalidFile, also for a policy in it that does not load."""
    document = parse(content, file=file, any_number=True)  # agents send NaN too
    problems = validate(document, schema("vectors"))
    if problems:
        raise InvalidFile(problems)
    cases = tuple(_cases(document, problems))
    for name, text in document.data.get("files", {}).items():
        if not isinstance(text, str):
            problems.append(document.problem(("files", name), "must be the text of a policy"))
    if problems:
        raise InvalidFile(problems)
    texts = document.data.get("files")
    policy = None if texts is None else loads({f"{file}: {n}": t for n, t in texts.items()})
    return Vectors(file, cases, policy)


def run(cases: Vectors, policy: Policy) -> Iterator[Outcome]:
    """Asks a policy every question of a file."""
    for case in cases.cases:
        decision = policy.decide(case.run, case.action, now=case.now)
        yield Outcome(case, decision, case.differences(decision))


def _cases(document: Document, problems: list[Problem]) -> Iterator[Case]:
    seen: set[str] = set()
    for index, written in enumerate(document.data["case"]):
        path = ("case", index)
        name = written["name"]
        if name in seen:
            message = f"{name!r} is the name of a case before it too"
            problems.append(document.problem((*path, "name"), message, "give it another"))
        seen.add(name)
        try:
            action = Action.from_json(written["action"])
        except MalformedValue as e:
            problems.append(document.problem((*path, "action"), str(e)))
            continue
        try:
            now = _moment(written.get("now", 0.0))
        except ValueError as e:
            message, fix = f"is no moment: {e}", "seconds since the epoch, or 2024-05-06T10:00:00Z"
            problems.append(document.problem((*path, "now"), message, fix))
            continue
        yield Case(name, document.line(path), _run(written), action, now, written["expect"])


def _moment(value: float | str) -> float:
    if isinstance(value, str):
        moment = datetime.datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("it does not say its time zone")
        return moment.timestamp()
    return float(value)


def _run(written: Mapping[str, Json]) -> Run:
    given = {**RUN, **written.get("run", {})}
    return Run(id="r", uid=1000, **{**given, "tags": tuple(given.get("tags", ()))})
