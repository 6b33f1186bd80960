"""Explanations: the same answer found by looking at every rule, with words for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aa.model import Action, Decision, Effect, Mode, Run
from aa.policy.matchers import ToolQuestion
from aa.policy.network import Match, NetworkQuestion, Request
from aa.policy.questions import network_questions
from aa.policy.rules import PolicyFile, Rule, Section
from aa.policy.weigh import Pair, Requested, denies_whole_host, requested

Json = Any


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was considered."""

    rule: str
    effect: str
    matched: bool
    why: str
    file: str = ""
    line: int = 0

    def as_json(self) -> dict[str, Json]:
        return {
            "rule": self.rule,
            "effect": self.effect,
            "matched": self.matched,
            "why": self.why,
            "file": self.file,
            "line": self.line,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision and everything that was considered for it."""

    decision: Decision
    steps: tuple[Step, ...]

    def as_json(self) -> dict[str, Json]:
        return {"decision": self.decision.as_json(), "steps": [s.as_json() for s in self.steps]}


class Search:
    """Finds what an index finds, without one, and keeps what it considered in `steps`."""

    def __init__(self, files: Sequence[PolicyFile], rules: Sequence[Rule]) -> None:
        self._files = files
        self._rules = rules
        self.steps: list[Step] = []

    # -- what an index offers

    def tools(self, q: ToolQuestion, bits: int, now: float) -> list[Rule]:
        return self.matching(Section.TOOL, q, bits, now)

    def matching(self, section: Section, q: Any, bits: int, now: float) -> list[Rule]:
        found = []
        for rule in self._of(section, bits):
            matched, why = rule.matcher.why(q)
            if self._consider(rule, matched, why, now):
                found.append(rule)
        return found

    def connections(
        self, action: Action, bits: int, now: float
    ) -> list[tuple[NetworkQuestion, Sequence[Pair]]]:
        questions = network_questions(action)
        self._connection_steps(questions, bits, now)
        return [(q, self._pairs(q, bits, now)) for q in questions]

    def requests(
        self, action: Action, request: Request, bits: int, now: float
    ) -> list[tuple[NetworkQuestion, Requested]]:
        found = []
        for q in network_questions(action):
            self._request_steps(q, request, bits, now)
            found.append((q, requested(self._pairs(q, bits, now), request, bits)))
        return found

    def hosts(self, name: str, bits: int, now: float) -> list[Rule]:
        self._name_steps(name, bits, now)
        rules = self._of(Section.NETWORK, bits)
        return [r for r in rules if _names(r, name) and r.holds(now)]

    # -- steps

    def _of(self, section: Section, bits: int) -> list[Rule]:
        return [r for r in self._rules if r.bit & bits and r.section is section]

    def _pairs(self, q: NetworkQuestion, bits: int, now: float) -> list[Pair]:
        return [
            (rule, match)
            for rule in self._of(Section.NETWORK, bits)
            if (match := rule.matcher.match(q)) and rule.holds(now)
        ]

    def _consider(self, rule: Rule, matched: bool, why: str, now: float) -> bool:
        """A rule whose time it is not does not match."""
        if matched and not rule.holds(now):
            matched, why = False, f"{why}, but this is not its time (when)"
        path = self._files[rule.file_number].path
        self.steps.append(Step(rule.ref, rule.effect.value, matched, why, path, rule.line))
        return matched

    def _connection_steps(
        self, questions: Sequence[NetworkQuestion], bits: int, now: float
    ) -> None:
        for rule in self._of(Section.NETWORK, bits):
            n = rule.network
            assert n is not None
            answers = [n.why(q) for q in questions]
            whys = list(dict.fromkeys(why for _, why in answers))
            matched = any(m for m, _ in answers)
            alone = not n.hosts and not questions[0].by_address
            if matched and n.content and not n.inspects:
                matched = False
                whys.append("it decides requests, where another rule inspects the connection")
            elif matched and n.looks:
                whys.append("it inspects, and asks about what another rule lets through")
            elif matched and n.inspects:
                whys.append("it inspects: each request is decided by itself")
            if matched and alone and rule.effect is not Effect.DENY:
                whys.append("for a connection by name it only lifts the guard or asks")
            self._consider(rule, matched, "; ".join(whys), now)
        self._guard_steps(questions)

    def _request_steps(self, q: NetworkQuestion, request: Request, bits: int, now: float) -> None:
        for rule in self._of(Section.NETWORK, bits):
            n = rule.network
            assert n is not None
            match, why = n.why(q)
            if match and n.content:
                match, inner = n.why_content(request)
                why = f"{why}; {inner}"
                if n.paths and request.path == "":
                    why += "; the path is ambiguous, which denies the request where a rule is about paths"
            self._consider(rule, match is Match.YES or (bool(match) and not n.content), why, now)
        self._guard_steps([q])

    def _guard_steps(self, questions: Sequence[NetworkQuestion]) -> None:
        for q in questions:
            if q.place is not None and q.place.guard:
                why = (
                    f"{q.place.text} is {q.place.guard}: a rule that matches must name it by cidrs"
                )
                self.steps.append(Step("<guard-list>", "deny", True, why))

    def _name_steps(self, name: str, bits: int, now: float) -> None:
        for rule in self._of(Section.NETWORK, bits):
            n = rule.network
            assert n is not None
            matched = _names(rule, name)
            why = f"its hosts match {name}" if matched else f"its hosts do not match {name}"
            if matched and n.content and (n.looks or not n.inspects):
                matched, why = False, f"it decides requests to {name}, not whether it is resolved"
            elif matched and rule.effect is Effect.DENY and not denies_whole_host(rule):
                matched, why = False, f"it leaves some of {name} open, so the name may be resolved"
            self._consider(rule, matched, why, now)


def _names(rule: Rule, name: str) -> bool:
    return rule.network is not None and any(h.matches(name) for h in rule.network.hosts)


def steps_of_other_files(
    files: Iterable[PolicyFile], applicable: Sequence[PolicyFile], run: Run
) -> Iterable[Step]:
    for f in files:
        if f in applicable:
            continue
        why = f"the file applies to {f.applies_to}; this run is agent {run.agent or '-'}, "
        why += f"user {run.user or '-'}, tags {', '.join(run.tags) or '-'}"
        yield Step(f.id, "", False, why, f.path, 1)


def steps_of_defaults(
    files: Iterable[PolicyFile], section: Section, decision: Decision
) -> Iterable[Step]:
    for f in files:
        stated = "states" if section in f.defaults else "does not state, which means"
        why = f"{f.path} {stated} default.{section.value} = {f.default(section)}"
        if f.mode is Mode.OBSERVE:
            why += " (observe)"
        used = decision.rule == "<default>"
        yield Step(f"{f.id}/<default>", f.default(section), used, why, f.path, f.line(section))
