"""The engine: decides an action of a run by the rules, and explains how. Pure: no I/O, no clock.

`Policy.decide` looks at the rules that an index finds for the question;
`Policy.explain` looks at every rule. Both weigh what matched with the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aa.model import Action, Decision, Effect, Kind, Mode, Obligation, Run
from aa.policy import obligations
from aa.policy.check import Finding, findings
from aa.policy.compile import Compiled, compiled
from aa.policy.explain import Explanation, Search, steps_of_defaults, steps_of_other_files
from aa.policy.host import InvalidHost
from aa.policy.index import RuleIndex
from aa.policy.limits import Limit
from aa.policy.matchers import ToolQuestion
from aa.policy.network import NetworkQuestion, Request
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
    Requested,
    Side,
    Verdict,
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

# Reading a member of an enumeration takes longer than reading a name of this module.
_TOOL_CALL, _HTTP_REQUEST, _NET_CONNECT = Kind.TOOL_CALL, Kind.HTTP_REQUEST, Kind.NET_CONNECT
_DENY, _ENFORCE = Effect.DENY, Mode.ENFORCE
_NETWORK, _TOOL = Section.NETWORK, Section.TOOL

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
    enforces: bool
    """Whether one of them does not."""
    limits: tuple[Limit, ...]
    secrets: tuple[Secret, ...]
    judges_models: bool
    """Whether the files that enforce say something about models."""
    models: bool
    """Whether requests to models are to be looked at."""


class Finder(Protocol):
    """Finds the rules that match: an index, or a search through all of them."""

    def tools(self, q: ToolQuestion, bits: int, now: float) -> list[Rule]: ...

    def matching(self, section: Section, q: Any, bits: int, now: float) -> list[Rule]: ...

    def connections(
        self, action: Action, bits: int, now: float
    ) -> list[tuple[NetworkQuestion, Sequence[Pair]]]: ...

    def requests(
        self, action: Action, request: Request, bits: int, now: float
    ) -> list[tuple[NetworkQuestion, Requested]]: ...

    def hosts(self, name: str, bits: int, now: float) -> list[Rule]: ...


class Policy:
    """All files of a policy, immutable. Their order makes no difference to any answer."""

    def __init__(self, files: Sequence[PolicyFile], revision: str) -> None:
        self.files = tuple(files)
        self.revision = revision
        self.rules = every_rule(self.files)
        self._index = RuleIndex(self.rules)
        self._views: dict[tuple[str, str, tuple[str, ...]], View] = {}
        self._compiled: dict[tuple[str, str, tuple[str, ...]], Compiled] = {}

    # -- what it is asked

    def decide(self, run: Run, action: Action, *, now: float) -> Decision:
        """The answer to an action of a run. `now` is in seconds since the epoch."""
        view = self._views.get((run.agent, run.user, run.tags)) or self._view(run)
        return self._answer(view, run, action, now, self._index)

    def explain(self, run: Run, action: Action, *, now: float) -> Explanation:
        """The same answer, found by looking at every rule, and why each did or did not match."""
        view = self._view(run)
        search = Search(self.files, self.rules)
        decision = self._answer(view, run, action, now, search)
        steps = [*steps_of_other_files(self.files, view.files, run), *search.steps]
        section = SECTIONS.get(action.kind)
        if section is not None and section in UNSTATED:
            steps += steps_of_defaults(view.files, section, decision)
        return Explanation(decision, tuple(steps))

    def check(self) -> list[Finding]:
        """What a person should look at in files that are valid."""
        return findings(self.files)

    def sandbox(self, run: Run) -> Sandbox:
        """What `[sandbox]` of the files that apply to a run agrees on. Files that observe count
        only where no file enforces."""
        view = self._view(run)
        return view.enforced.sandbox if view.enforces else view.every.sandbox

    def writable(self, run: Run) -> tuple[str, ...] | None:
        """Folders that `[sandbox] writable` opens to a run, or None if no file states it. `.` is the
        working directory, `~` the home."""
        return self.sandbox(run).writable

    def compile(self, run: Run) -> Compiled:
        """What of the policy is enforced elsewhere than by asking: the same for every run of an
        agent, a user and tags. Files that only observe have no rules and defaults in it."""
        key = (run.agent, run.user, run.tags)
        found = self._compiled.get(key)
        if found is None:
            if len(self._compiled) >= VIEWS_LIMIT:
                self._compiled.clear()
            enforced = self._view(run).enforced
            binds = bool(enforced.files)
            found = self._compiled[key] = compiled(
                [r for r in self.rules if r.bit & enforced.files],
                self.sandbox(run),
                file=enforced.defaults[Section.FILE] if binds else UNSTATED[Section.FILE],
                exec_=enforced.defaults[Section.EXEC] if binds else UNSTATED[Section.EXEC],
                network=enforced.defaults[Section.NETWORK],
            )
        return found

    def limits(self, run: Run) -> tuple[Limit, ...]:
        """The limits of all files that apply to a run."""
        return self._view(run).limits

    def judges_models(self, run: Run) -> bool:
        """Whether files that bind a run say something about models."""
        return self._view(run).judges_models

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
        enforced_side = _side(enforced)
        about_models = sum({r.bit for r in self.rules if r.llm is not None})
        for bit, f in applicable:
            if f.default(Section.LLM) != Effect.ALLOW.value:
                about_models |= bit
        return View(
            files=tuple(f for _, f in applicable),
            bits=every.files,
            enforced=enforced_side,
            every=every,
            observes=len(enforced) < len(applicable),
            enforces=bool(enforced),
            limits=limits,
            secrets=tuple(s for _, f in enforced for s in f.secrets),
            judges_models=bool(about_models & enforced_side.files),
            models=bool(about_models & every.files) or any(x.is_about_models for x in limits),
        )

    # -- from verdict to decision

    def _answer(self, view: View, run: Run, action: Action, now: float, finder: Finder) -> Decision:
        """Modes: files that enforce decide. Files that observe take part in `would` alone, so
        that they neither block nor open anything."""
        if not view.files:
            why = NO_POLICY if not self.files else not_for(run)
            return Decision(Effect.DENY, why, "<no-policy>", self.revision)
        try:
            weigh = self._found(view, run, action, now, finder)
        except Malformed as e:
            weigh = _always(Verdict(Effect.DENY, e.rule, words=str(e)))
        except InvalidHost as e:
            weigh = _always(Verdict(Effect.DENY, "<invalid-host>", words=str(e)))
        would = weigh(view.every) if view.observes else None
        if not view.enforces:
            assert would is not None
            return Decision(
                Effect.ALLOW,
                observed_reason(would, action, view.files),
                name_of(would.rule),
                self.revision,
                Mode.OBSERVE,
                would.effect,
                self._obligations(view, action, would, now) if would.stated else (),
            )
        verdict = weigh(view.enforced)
        rule = verdict.rule
        owed = verdict.inspects or verdict.judged or view.secrets
        return Decision(
            verdict.effect,
            reason(verdict, action, view.files),
            rule if isinstance(rule, str) else rule.ref,
            self.revision,
            _ENFORCE,
            would.effect if would is not None else None,
            self._obligations(view, action, verdict, now) if owed else (),
            asked_by=tuple(map(name_of, verdict.asks)) if verdict.asks else (),
        )

    def _obligations(
        self, view: View, action: Action, verdict: Verdict, now: float
    ) -> tuple[Obligation, ...]:
        if verdict.effect is Effect.DENY:
            return ()
        if action.kind is Kind.NET_CONNECT and verdict.inspects:
            found = self._index.about(action)
            binding = view.enforced.files or view.bits
            owed = obligations.of_connection(
                found, binding=binding, files=view.bits, models=view.models
            )
            return (owed,)
        if action.kind is Kind.HTTP_REQUEST:
            (q, *_) = network_questions(action)
            return obligations.of_request(q, request_of(action)[0], verdict.judged, view.secrets)
        return ()

    def _found(self, view: View, run: Run, action: Action, now: float, finder: Finder) -> Weigh:
        """Finds out what matches. Raises Malformed or InvalidHost."""
        kind = action.kind
        if kind is _TOOL_CALL:
            rules = finder.tools(tool_question(action), view.bits, now)
            return lambda side: weigh_rules(rules, side.files, side.defaults[_TOOL])
        if kind is _HTTP_REQUEST:
            return _request(view, action, now, finder)
        if kind is _NET_CONNECT:
            return _connection(view, action, now, finder)
        if kind is Kind.DNS_QUERY:
            return _name(view, action, now, finder)
        if kind in _FILE_KINDS:
            return _file(view, run, action, now, finder)
        if kind is Kind.NET_ACCEPT:
            inbound = inbound_question(action)
            rules = finder.matching(Section.INBOUND, inbound, view.bits, now)
            return lambda side: weigh_inbound(inbound, rules, side.files)
        section = SECTIONS.get(kind)
        if section is None:
            words = f"{kind.value} is recorded, never asked for"
            return _always(Verdict(Effect.DENY, "<not-decided>", words=words))
        question: Any
        if kind is Kind.MCP_CALL:
            question = mcp_question(action)
        elif kind is Kind.LLM_REQUEST:
            question = llm_question(action)
        else:
            question = exec_question(run, action)
        rules = finder.matching(section, question, view.bits, now)
        return lambda side: weigh_rules(rules, side.files, side.defaults[section])


_FILE_KINDS = (Kind.FILE_OPEN, Kind.FILE_UNLINK, Kind.FILE_RENAME)


def _connection(view: View, action: Action, now: float, finder: Finder) -> Weigh:
    asked = finder.connections(action, view.bits, now)

    def weigh(side: Side) -> Verdict:
        default = side.defaults[_NETWORK]
        found = [weigh_connection(q, pairs, side.files, default) for q, pairs in asked]
        return found[0] if len(found) == 1 else worst(found)

    return weigh


def _request(view: View, action: Action, now: float, finder: Finder) -> Weigh:
    request, ambiguous = request_of(action)
    asked = finder.requests(action, request, view.bits, now)

    if len(asked) == 1:  # inspected connections have one address
        ((q, found),) = asked
        return lambda side: weigh_request(q, found, side.files, side.defaults[_NETWORK], ambiguous)

    def weigh(side: Side) -> Verdict:
        default = side.defaults[_NETWORK]
        return worst(weigh_request(q, r, side.files, default, ambiguous) for q, r in asked)

    return weigh


def _name(view: View, action: Action, now: float, finder: Finder) -> Weigh:
    name = asked_name(action)
    network = finder.hosts(name, view.bits, now)
    dns = finder.matching(Section.DNS, name, view.bits, now)
    return lambda side: weigh_name(network, dns, side.files, side.defaults[Section.DNS])


def _file(view: View, run: Run, action: Action, now: float, finder: Finder) -> Weigh:
    asked = [
        (q, finder.matching(Section.FILE, q, view.bits, now)) for q in file_questions(run, action)
    ]

    def weigh(side: Side) -> Verdict:
        return worst(
            weigh_file(q, rules, side, directory=run.directory, home=run.home) for q, rules in asked
        )

    return weigh


def _always(verdict: Verdict) -> Weigh:
    return lambda _side: verdict


def _side(files: Sequence[tuple[int, PolicyFile]]) -> Side:
    defaults = {
        section: min((f.default(section) for _, f in files), key=_STRICTNESS.index, default="deny")
        for section in UNSTATED
    }
    return Side(sum(bit for bit, _ in files), defaults, merged([f.sandbox for _, f in files]))
