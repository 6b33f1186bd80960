"""The engine: decides an action of a run by the rules, and explains how. Pure: no I/O, no clock.

`Policy.decide` looks at the rules that an index finds for the question;
`Policy.explain` looks at every rule. Both weigh what matched with the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aa.model import Action, Decision, Effect, Kind, Mode, Obligation, Run
from aa.policy import obligations
from aa.policy.check import Finding, findings
from aa.policy.host import InvalidHost
from aa.policy.index import RuleIndex
from aa.policy.limits import Limit
from aa.policy.matchers import PathQuestion
from aa.policy.network import Match, NetworkQuestion, Request
from aa.policy.pathname import components
from aa.policy.questions import (
    Malformed,
    asked_name,
    exec_question,
    file_questions,
    inbound_question,
    llm_question,
    mcp_question,
    network_questions,
    request_of,
    tool_question,
)
from aa.policy.rules import UNSTATED, PolicyFile, Rule, Section, every_rule
from aa.policy.sandbox import Sandbox, merged
from aa.policy.secret import Secret
from aa.policy.weigh import (
    Pair,
    Side,
    Verdict,
    denies_whole_host,
    weigh_connection,
    weigh_file,
    weigh_inbound,
    weigh_name,
    weigh_request,
    weigh_rules,
    worst,
)
from aa.policy.words import NO_POLICY, name_of, not_for, observed_reason, reason

Json = Any

VIEWS_LIMIT = 4096
"""Different kinds of runs whose applicable files are remembered."""

SECTIONS: Mapping[Kind, Section] = {
    Kind.NET_CONNECT: Section.NETWORK,
    Kind.HTTP_REQUEST: Section.NETWORK,
    Kind.NET_ACCEPT: Section.INBOUND,
    Kind.DNS_QUERY: Section.DNS,
    Kind.TOOL_CALL: Section.TOOL,
    Kind.MCP_CALL: Section.MCP,
    Kind.LLM_REQUEST: Section.LLM,
    Kind.EXEC: Section.EXEC,
    Kind.FILE_OPEN: Section.FILE,
    Kind.FILE_UNLINK: Section.FILE,
    Kind.FILE_RENAME: Section.FILE,
}

_STRICTNESS = ("deny", "ask", "sandbox", "allow")

Weigh = Callable[[Side], Verdict]
"""Weighs what matched, for a set of files."""


@dataclass(frozen=True, slots=True)
class View:
    """The files that apply to one kind of run: those that enforce, and all together."""

    files: tuple[PolicyFile, ...]
    bits: int
    enforced: Side
    every: Side
    observes: bool
    """Whether one of the files only observes."""
    mode: Mode
    limits: tuple[Limit, ...]
    secrets: tuple[Secret, ...]
    models: bool
    """Whether requests to models are to be looked at."""


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


class Policy:
    """All files of a policy, immutable. Their order makes no difference to any answer."""

    def __init__(self, files: Sequence[PolicyFile], revision: str) -> None:
        self.files = tuple(files)
        self.revision = revision
        self.rules = every_rule(self.files)
        self._index = RuleIndex(self.rules)
        self._views: dict[tuple[str, str, tuple[str, ...]], View] = {}

    # -- what it is asked

    def decide(self, run: Run, action: Action, *, now: float) -> Decision:
        """The answer to an action of a run. `now` is in seconds since the epoch."""
        view = self._view(run)
        return self._answer(view, run, action, self._weigher(view, run, action, now, None))

    def explain(self, run: Run, action: Action, *, now: float) -> Explanation:
        """The same answer, found by looking at every rule, and why each did or did not match."""
        view = self._view(run)
        steps: list[Step] = [*self._file_steps(view, run)]
        weigh = self._weigher(view, run, action, now, steps)
        decision = self._answer(view, run, action, weigh)
        section = SECTIONS.get(action.kind)
        if section is not None and section in UNSTATED:
            steps += _default_steps(view, section, decision)
        return Explanation(decision, tuple(steps))

    def check(self) -> list[Finding]:
        """What a person should look at in files that are valid."""
        return findings(self.files)

    def sandbox(self, run: Run) -> Sandbox:
        """What `[sandbox]` of the files that apply to a run agrees on. Files that observe count
        only where no file enforces."""
        view = self._view(run)
        return view.every.sandbox if view.mode is Mode.OBSERVE else view.enforced.sandbox

    def writable(self, run: Run) -> tuple[str, ...] | None:
        """Folders that `[sandbox] writable` opens to a run, or None if no file states it. `.` is the
        working directory, `~` the home."""
        return self.sandbox(run).writable

    def limits(self, run: Run) -> tuple[Limit, ...]:
        """The limits of all files that apply to a run."""
        return self._view(run).limits

    def inspected(self) -> tuple[str, ...]:
        """The host patterns, and the ranges without one, that rules decrypt for any run."""
        found: set[str] = set()
        for rule in self.rules:
            n = rule.network
            if n is None or not n.inspects:
                continue
            if self.files[rule.file_number].mode is Mode.ENFORCE or n.inspect:
                found.update(str(h) for h in n.hosts)
                found.update(r.text for r in n.ranges if not n.hosts)
        return tuple(sorted(found))

    # -- which files apply

    def _view(self, run: Run) -> View:
        key = (run.agent, run.user, run.tags)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= VIEWS_LIMIT:
                self._views.clear()
            view = self._views[key] = self._make_view(run)
        return view

    def _make_view(self, run: Run) -> View:
        applicable = [(1 << n, f) for n, f in enumerate(self.files) if f.applies_to.selects(run)]
        enforced = [(bit, f) for bit, f in applicable if f.mode is Mode.ENFORCE]
        every = _side(applicable)
        limits = tuple(limit for _, f in applicable for limit in f.limits)
        models = any(r.llm is not None and r.bit & every.files for r in self.rules)
        return View(
            files=tuple(f for _, f in applicable),
            bits=every.files,
            enforced=_side(enforced),
            every=every,
            observes=len(enforced) < len(applicable),
            mode=Mode.OBSERVE if applicable and not enforced else Mode.ENFORCE,
            limits=limits,
            secrets=tuple(s for _, f in enforced for s in f.secrets),
            models=models
            or every.defaults[Section.LLM] != Effect.ALLOW.value
            or any(limit.is_about_models for limit in limits),
        )

    # -- from verdict to decision

    def _answer(self, view: View, run: Run, action: Action, weigh: Weigh) -> Decision:
        """Modes: files that enforce decide. Files that observe take part in `would` alone, so
        that they neither block nor open anything."""
        if not view.files:
            why = NO_POLICY if not self.files else not_for(run)
            return Decision(Effect.DENY, why, "<no-policy>", self.revision)
        would = weigh(view.every) if view.observes else None
        if view.mode is Mode.OBSERVE:
            assert would is not None
            return Decision(
                Effect.ALLOW,
                observed_reason(would, action, view.files),
                name_of(would.rule),
                self.revision,
                Mode.OBSERVE,
                would.effect,
                self._obligations(view, action, would) if would.stated else (),
            )
        verdict = weigh(view.enforced)
        return Decision(
            verdict.effect,
            reason(verdict, action, view.files),
            name_of(verdict.rule),
            self.revision,
            Mode.ENFORCE,
            would.effect if would is not None else None,
            self._obligations(view, action, verdict),
            asked_by=tuple(name_of(rule) for rule in verdict.asks),
        )

    def _obligations(self, view: View, action: Action, verdict: Verdict) -> tuple[Obligation, ...]:
        if verdict.effect is Effect.DENY:
            return ()
        if action.kind is Kind.NET_CONNECT and verdict.inspects:
            questions = network_questions(action)
            rules = [r for q in questions for r in self._candidates(q)]
            return (obligations.of_connection(rules, view.bits, questions, view.models),)
        if action.kind is Kind.HTTP_REQUEST and (verdict.judged or view.secrets):
            q = network_questions(action)[0]
            return obligations.of_request(q, request_of(action)[0], verdict.judged, view.secrets)
        return ()

    def _weigher(
        self, view: View, run: Run, action: Action, now: float, steps: list[Step] | None
    ) -> Weigh:
        """Finds out what matches; with `steps`, by looking at every rule and saying why."""
        kind = action.kind
        try:
            if kind is Kind.TOOL_CALL:
                tool = tool_question(action)
                return self._by_rules(view, now, steps, Section.TOOL, tool, self._index.tool)
            if kind is Kind.HTTP_REQUEST:
                return self._request(view, action, now, steps)
            if kind is Kind.NET_CONNECT:
                return self._connection(view, action, now, steps)
            if kind is Kind.DNS_QUERY:
                return self._name(view, action, now, steps)
            if kind is Kind.MCP_CALL:
                mcp = mcp_question(action)
                return self._by_rules(view, now, steps, Section.MCP, mcp, self._index.mcp)
            if kind is Kind.LLM_REQUEST:
                llm = llm_question(action)
                return self._by_rules(view, now, steps, Section.LLM, llm, self._index.llm)
            if kind is Kind.EXEC:
                path = exec_question(run, action)
                return self._by_rules(view, now, steps, Section.EXEC, path, self._index.exec)
            if kind is Kind.NET_ACCEPT:
                inbound = inbound_question(action)
                found = self._matching(
                    view, now, steps, Section.INBOUND, inbound, self._index.inbound
                )
                return lambda side: weigh_inbound(inbound, found, side.files)
            if SECTIONS.get(kind) is Section.FILE:
                return self._file(view, run, action, now, steps)
            words = f"{kind.value} is recorded, never asked for"
            return _always(Verdict(Effect.DENY, "<not-decided>", words=words))
        except (Malformed, InvalidHost) as e:
            rule = e.rule if isinstance(e, Malformed) else "<invalid-host>"
            return _always(Verdict(Effect.DENY, rule, words=str(e)))

    # -- rules that match a question by one matcher

    def _by_rules(
        self,
        view: View,
        now: float,
        steps: list[Step] | None,
        section: Section,
        question: Any,
        candidates: Callable[[Any], Sequence[Rule]],
    ) -> Weigh:
        rules = self._matching(view, now, steps, section, question, candidates)
        return lambda side: weigh_rules(rules, side.files, side.defaults[section])

    def _matching(
        self,
        view: View,
        now: float,
        steps: list[Step] | None,
        section: Section,
        question: Any,
        candidates: Callable[[Any], Sequence[Rule]],
    ) -> list[Rule]:
        if steps is None:
            return [
                rule
                for rule in candidates(question)
                if rule.bit & view.bits and rule.matcher.matches(question) and rule.holds(now)
            ]
        found = []
        for rule in self._rules_of(view, section):
            matched, why = rule.matcher.why(question)
            matched = self._step(steps, rule, matched, why, now)
            if matched:
                found.append(rule)
        return found

    def _rules_of(self, view: View, section: Section) -> list[Rule]:
        return [r for r in self.rules if r.bit & view.bits and r.section is section]

    def _step(self, steps: list[Step], rule: Rule, matched: bool, why: str, now: float) -> bool:
        """Adds what was considered; a rule whose time it is not does not match."""
        if matched and not rule.holds(now):
            matched, why = False, f"{why}, but this is not its time (when)"
        file = self.files[rule.file_number]
        steps.append(Step(rule.ref, rule.effect.value, matched, why, file.path, rule.line))
        return matched

    def _file(
        self, view: View, run: Run, action: Action, now: float, steps: list[Step] | None
    ) -> Weigh:
        asked: list[tuple[PathQuestion, list[Rule]]] = []
        for q in file_questions(run, action):
            found = self._matching(view, now, steps, Section.FILE, q, self._index.file)
            asked.append((q, found))

        def weigh(side: Side) -> Verdict:
            return worst(
                weigh_file(q, rules, side, directory=run.directory, home=run.home)
                for q, rules in asked
            )

        return weigh

    # -- the network

    def _connection(
        self, view: View, action: Action, now: float, steps: list[Step] | None
    ) -> Weigh:
        questions = network_questions(action)
        asked = [(q, self._pairs(view, q, now, steps is not None)) for q in questions]
        if steps is not None:
            self._connection_steps(view, questions, now, steps)

        def weigh(side: Side) -> Verdict:
            default = side.defaults[Section.NETWORK]
            found = [weigh_connection(q, pairs, side.files, default) for q, pairs in asked]
            return found[0] if len(found) == 1 else worst(found)

        return weigh

    def _pairs(self, view: View, q: NetworkQuestion, now: float, every: bool) -> list[Pair]:
        """The rules that match a connection; `every`: without the index."""
        found: list[Pair] = []
        if every:
            for rule in self._rules_of(view, Section.NETWORK):
                if rule.network is not None and (match := rule.network.match(q)):
                    found.append((rule, match))
        else:
            for rule in self._candidates(q):
                if rule.bit & view.bits and rule.network is not None:
                    match = rule.network.match_rest(q)
                    if match:
                        found.append((rule, match))
        return [(rule, match) for rule, match in found if rule.holds(now)]

    def _candidates(self, q: NetworkQuestion) -> Sequence[Rule]:
        named: Sequence[Rule] = self._index.host(q.host).rules if q.host else ()
        return self._with_addresses(q, named)

    def _with_addresses(self, q: NetworkQuestion, named: Sequence[Rule]) -> Sequence[Rule]:
        by_address = self._index.addresses(q)
        return sorted((*named, *by_address), key=_by_ref) if by_address else named

    def _request(self, view: View, action: Action, now: float, steps: list[Step] | None) -> Weigh:
        request, ambiguous = request_of(action)
        asked = [
            (q, *self._requested(view, q, request, now, steps is not None))
            for q in network_questions(action)
        ]
        if steps is not None:
            for q, *_ in asked:
                self._request_steps(view, q, request, ambiguous, now, steps)

        def weigh(side: Side) -> Verdict:
            default = side.defaults[Section.NETWORK]
            found = [
                weigh_request(
                    q,
                    rules,
                    side.files,
                    default,
                    ambiguous=ambiguous if ambiguous and paths & side.files else "",
                    judged=judged,
                )
                for q, rules, judged, paths in asked
            ]
            return found[0] if len(found) == 1 else worst(found)

        return weigh

    def _requested(
        self, view: View, q: NetworkQuestion, request: Request, now: float, every: bool
    ) -> tuple[list[Rule], list[Rule], int]:
        """The rules that match a request; those that want to see its body; the files, as bits, that
        have rules about paths of its host."""
        rules: list[Rule] = []
        judged: list[Rule] = []
        paths = 0
        for rule in self._request_candidates(view, q, request, every):
            n = rule.network
            if not rule.bit & view.bits or n is None:
                continue
            if not (n.match(q) if every else n.match_rest(q)) or not rule.holds(now):
                continue
            if n.content:
                if n.paths:
                    paths |= rule.bit
                if not n.match_head(request):
                    continue
                if n.body is not None or n.ws is not None:
                    judged.append(rule)
                    if n.match_facts(request) is not Match.YES:
                        continue
            rules.append(rule)
        return rules, judged, paths

    def _request_candidates(
        self, view: View, q: NetworkQuestion, request: Request, every: bool
    ) -> Sequence[Rule]:
        if every:
            return self._rules_of(view, Section.NETWORK)
        if not q.host:
            return self._with_addresses(q, ())
        host = self._index.host(q.host)
        # An ambiguous path is told by any rule about paths, so then all are looked at.
        named = host.of_path(components(request.path)) if request.path else host.rules
        return self._with_addresses(q, named)

    def _name(self, view: View, action: Action, now: float, steps: list[Step] | None) -> Weigh:
        name = asked_name(action)
        if steps is None:
            network = [r for r in self._index.host(name).rules if r.holds(now)]
            dns: Sequence[Rule] = [r for r in self._index.names(name) if r.holds(now)]
        else:
            rules = self._rules_of(view, Section.NETWORK)
            network = [r for r in rules if r.network and _names(r, name) and r.holds(now)]
            self._name_steps(view, name, now, steps)
            dns = self._matching(view, now, steps, Section.DNS, name, self._index.names)
        return lambda side: weigh_name(network, dns, side.files, side.defaults[Section.DNS])

    # -- steps of an explanation

    def _file_steps(self, view: View, run: Run) -> Iterable[Step]:
        for f in self.files:
            if f in view.files:
                continue
            why = f"the file applies to {f.applies_to}; this run is agent {run.agent or '-'}, "
            why += f"user {run.user or '-'}, tags {', '.join(run.tags) or '-'}"
            yield Step(f.id, "", False, why, f.path, 1)

    def _connection_steps(
        self, view: View, questions: Sequence[NetworkQuestion], now: float, steps: list[Step]
    ) -> None:
        for rule in self._rules_of(view, Section.NETWORK):
            assert rule.network is not None
            answers = [rule.network.why(q) for q in questions]
            whys = list(dict.fromkeys(why for _, why in answers))
            matched = any(m for m, _ in answers)
            alone = matched and not rule.network.hosts and not questions[0].by_address
            if matched and rule.network.content and not rule.network.inspects:
                matched = False
                whys.append("it decides requests, where another rule inspects the connection")
            elif matched and rule.network.inspects:
                whys.append("it inspects: each request is decided by itself")
            elif alone and rule.effect is not Effect.DENY:
                whys.append("for a connection by name it only lifts the guard or asks")
            self._step(steps, rule, matched, "; ".join(whys), now)
        _guard_steps(questions, steps)

    def _request_steps(
        self,
        view: View,
        q: NetworkQuestion,
        request: Request,
        ambiguous: str,
        now: float,
        steps: list[Step],
    ) -> None:
        for rule in self._rules_of(view, Section.NETWORK):
            assert rule.network is not None
            match, why = rule.network.why(q)
            if match and rule.network.content:
                match, inner = rule.network.why_content(request)
                why = f"{why}; {inner}"
                match = match if match is Match.YES else Match.NO
            self._step(steps, rule, bool(match), why, now)
            if ambiguous and rule.network.paths and rule.network.match(q) and rule.holds(now):
                why = f"{rule.ref} is about paths of this host, and the path is ambiguous: {ambiguous}"
                steps.append(Step("<ambiguous-path>", "deny", True, why))
        _guard_steps([q], steps)

    def _name_steps(self, view: View, name: str, now: float, steps: list[Step]) -> None:
        for rule in self._rules_of(view, Section.NETWORK):
            n = rule.network
            matched = _names(rule, name)
            why = f"its hosts match {name}" if matched else f"its hosts do not match {name}"
            if matched and n is not None and n.content and not n.inspects:
                matched, why = False, f"it decides requests to {name}, not whether it is resolved"
            elif matched and rule.effect is Effect.DENY and not denies_whole_host(rule):
                matched, why = False, f"it leaves some of {name} open, so the name may be resolved"
            self._step(steps, rule, matched, why, now)


def _by_ref(rule: Rule) -> str:
    return rule.ref


def _names(rule: Rule, name: str) -> bool:
    return rule.network is not None and any(h.matches(name) for h in rule.network.hosts)


def _always(verdict: Verdict) -> Weigh:
    return lambda _side: verdict


def _side(files: Sequence[tuple[int, PolicyFile]]) -> Side:
    defaults = {
        section: min((f.default(section) for _, f in files), key=_STRICTNESS.index, default="deny")
        for section in UNSTATED
    }
    return Side(sum(bit for bit, _ in files), defaults, merged([f.sandbox for _, f in files]))


def _guard_steps(questions: Sequence[NetworkQuestion], steps: list[Step]) -> None:
    for q in questions:
        if q.place is not None and q.place.guard:
            why = f"{q.place.text} is {q.place.guard}: a rule that matches must name it by cidrs"
            steps.append(Step("<guard-list>", "deny", True, why))


def _default_steps(view: View, section: Section, decision: Decision) -> Iterable[Step]:
    for f in view.files:
        stated = "states" if section in f.defaults else "does not state, which means"
        why = f"{f.path} {stated} default.{section.value} = {f.default(section)}"
        if f.mode is Mode.OBSERVE:
            why += " (observe)"
        used = decision.rule == "<default>"
        yield Step(f"{f.id}/<default>", f.default(section), used, why, f.path, f.line(section))
