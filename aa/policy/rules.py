"""Rules as values: what a file says, ready to be matched against a question.

A question is an action in the form that rules compare with. Each matcher
answers it twice: `match` quickly for a decision, `why` in words for an
explanation. Both come from the same conditions in the same order.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aa.model import Effect, Mode, Run
from aa.policy.address import Place, Range
from aa.policy.arguments import Predicate
from aa.policy.limits import Limit
from aa.policy.pattern import HostPattern, Matcher
from aa.tomlfile import Document

Json = Any

DEFAULT_PORTS = frozenset((443, 80))
"""Ports of an allow or ask rule that names none. A deny rule that names none is about all."""


class Section(enum.StrEnum):
    """What a rule can be about, and what has a default."""

    NETWORK = "network"
    DNS = "dns"
    EXEC = "exec"
    FILE = "file"
    TOOL = "tool"
    MCP = "mcp"


UNSTATED: Mapping[Section, str] = {
    Section.NETWORK: "deny",
    Section.DNS: "deny",
    Section.EXEC: "allow",
    Section.FILE: "sandbox",
    Section.TOOL: "deny",
    Section.MCP: "deny",
}
"""The defaults of a policy that does not state them."""


class Match(enum.IntEnum):
    NO = 0
    PROVISIONAL = 1  # as far as is known; the addresses or the protocol will tell
    YES = 2


class NetworkQuestion(NamedTuple):
    """One connection to one of its addresses, or to none in the step of names.

    With `by_address` the client asked for the address itself; `host` is then the name
    that our resolver gave the run for it, if any.
    """

    host: str
    port: int
    protocol: str  # "" while it is not known
    place: Place | None
    by_address: bool = False


class ToolQuestion(NamedTuple):
    name: str
    arguments: Json


@dataclass(frozen=True, slots=True)
class NetworkMatcher:
    """`ports` is None for all of them. `hosts` or `ranges` is not empty."""

    hosts: tuple[HostPattern, ...]
    ranges: tuple[Range, ...]
    ports: frozenset[int] | None
    protocol: str
    """`any`, `web` (TLS and HTTP), `tls`, `http` or `opaque`."""
    effect: Effect

    def match(self, q: NetworkQuestion) -> Match:
        if self.ports is not None and q.port not in self.ports:
            return Match.NO
        if self.hosts and not (q.host and any(h.matches(q.host) for h in self.hosts)):
            return Match.NO
        return self.match_rest(q)

    def match_rest(self, q: NetworkQuestion) -> Match:
        """The same for a question whose host is known to match."""
        if self.ports is not None and q.port not in self.ports:
            return Match.NO
        certain = True
        if self.ranges:
            if q.place is None:
                if not self.hosts or self.effect is Effect.DENY:
                    return Match.NO
                certain = False
            elif not self._in_range(q.place):
                return Match.NO
        if self.protocol != "any" and self.protocol != q.protocol:
            speaks = self._speaks(q.protocol)
            if speaks is Match.NO:
                return Match.NO
            certain = certain and speaks is Match.YES
        return Match.YES if certain else Match.PROVISIONAL

    def _in_range(self, place: Place) -> bool:
        if any(r.contains(place) for r in self.ranges):
            return True
        # A deny of 10.0.0.0/8 is meant for 64:ff9b::10.0.0.1 too.
        inner = place.inner
        return (
            self.effect is Effect.DENY
            and inner is not None
            and any(r.contains(inner) for r in self.ranges)
        )

    def _speaks(self, protocol: str) -> Match:
        if not protocol:
            return Match.NO if self.effect is Effect.DENY else Match.PROVISIONAL
        if self.protocol == "web":
            return Match.NO if protocol == "opaque" else Match.YES
        return Match.YES if protocol == self.protocol else Match.NO

    def why(self, q: NetworkQuestion) -> tuple[Match, str]:
        """The answer of `match`, and the words for it."""
        answer = self.match(q)
        if self.ports is not None and q.port not in self.ports:
            return answer, f"its ports are {_listed(sorted(self.ports))}, not {q.port}"
        if self.hosts and not q.host:
            return answer, "it names hosts, and this connection is to an address without a name"
        if self.hosts and not any(h.matches(q.host) for h in self.hosts):
            return answer, f"none of its hosts ({_listed(self.hosts)}) matches {q.host}"
        if self.ranges and q.place is None and not self.hosts:
            return answer, "it is about addresses, and this step knows the name alone"
        if self.ranges and q.place is None and answer is Match.NO:
            return answer, "it needs the addresses, and this step knows the name alone"
        if self.ranges and q.place is not None and not self._in_range(q.place):
            ranges = _listed(r.text for r in self.ranges)
            return answer, f"{q.place.text} is in none of its cidrs ({ranges})"
        if answer is Match.NO:
            return answer, _protocol_words(self.protocol, q.protocol)
        where = f"{q.host or (q.place.text if q.place else '')} port {q.port}"
        if answer is Match.PROVISIONAL:
            return answer, f"{where} fits so far; its addresses or its protocol will tell"
        return answer, f"{where} fits"


def _protocol_words(wanted: str, spoken: str) -> str:
    if not spoken:
        return "it depends on the protocol, which is not known yet"
    if wanted == "web":
        return (
            "it is for TLS and HTTP, and this connection speaks neither: "
            'for ssh and the like a rule needs protocol = "opaque"'
        )
    return f"it is for {wanted}, and this connection speaks {spoken}"


@dataclass(frozen=True, slots=True)
class ToolMatcher:
    """`names` are tests of the whole name; all predicates must hold."""

    names: tuple[str, ...]
    tests: tuple[Matcher, ...]
    predicates: tuple[Predicate, ...]
    effect: Effect

    def match(self, q: ToolQuestion) -> Match:
        if not any(test(q.name) for test in self.tests):
            return Match.NO
        return self.match_rest(q)

    def match_rest(self, q: ToolQuestion) -> Match:
        """The same for a question whose name is known to match."""
        against = self.effect is not Effect.ALLOW
        for p in self.predicates:
            if not p.holds(q.arguments, against=against):
                return Match.NO
        return Match.YES

    def why(self, q: ToolQuestion) -> tuple[Match, str]:
        answer = self.match(q)
        if not any(test(q.name) for test in self.tests):
            return answer, f"none of its names ({_listed(self.names)}) matches"
        against = self.effect is not Effect.ALLOW
        for p in self.predicates:
            if not p.holds(q.arguments, against=against):
                return answer, f"the argument does not fulfil {p}"
        return answer, "name and arguments fit" if self.predicates else "the name fits"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a file. `ref` is how decisions name it: POLICY-ID/RULE-ID."""

    ref: str
    id: str
    effect: Effect
    reason: str
    section: Section
    network: NetworkMatcher | None
    tool: ToolMatcher | None
    file: int  # index into the policy's files
    bit: int  # 1 << file
    document: Document = field(repr=False, compare=False)
    number: int
    """The how manieth rule of its document this is, from 0."""

    @property
    def line(self) -> int:
        return self.document.line(("rule", self.number))

    @property
    def written(self) -> Mapping[str, Json]:
        """The matcher as the file has it."""
        rule: Mapping[str, Json] = self.document.data["rule"][self.number]
        return {self.section.value: rule[self.section.value]}

    def as_json(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "effect": self.effect.value,
            "reason": self.reason,
            "matcher": dict(self.written),
            "line": self.line,
        }


@dataclass(frozen=True, slots=True)
class Selector:
    """Which runs a policy is about. An empty part selects all; the parts are ANDed."""

    agents: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()

    def selects(self, run: Run) -> bool:
        return (
            (not self.agents or run.agent in self.agents)
            and (not self.users or run.user in self.users)
            and (not self.tags or not self.tags.isdisjoint(run.tags))
        )

    def as_json(self) -> dict[str, Json]:
        parts = {"agents": self.agents, "users": self.users, "tags": self.tags}
        return {name: sorted(values) for name, values in parts.items() if values}

    def __str__(self) -> str:
        parts = (f"{name} {_listed(values)}" for name, values in self.as_json().items())
        return " and ".join(parts) or "every run"


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """One file of policy.d."""

    path: str
    id: str
    revision: str
    mode: Mode
    applies_to: Selector
    defaults: Mapping[Section, str]
    """Those that the file states."""
    rules: tuple[Rule, ...]
    writable: tuple[str, ...] | None
    """`[sandbox] writable`, None if the file does not state it."""
    limits: tuple[Limit, ...]
    document: Document = field(repr=False, compare=False)

    @property
    def digest(self) -> str:
        return self.document.digest

    def line(self, section: Section) -> int:
        """Where the default of a section stands, or the policy that does not state it."""
        return self.document.line(("policy", "default", section.value))

    def default(self, section: Section) -> str:
        return self.defaults.get(section, UNSTATED[section])

    def as_json(self) -> dict[str, Json]:
        return {
            "path": self.path,
            "id": self.id,
            "revision": self.revision,
            "mode": self.mode.value,
            "applies_to": self.applies_to.as_json(),
            "default": {section.value: self.default(section) for section in Section},
            "writable": None if self.writable is None else list(self.writable),
            "rules": [rule.as_json() for rule in self.rules],
            "limits": [limit.as_json() for limit in self.limits],
        }

    def __str__(self) -> str:
        return f"{self.path} ({self.id})"


def _listed(values: Any, limit: int = 6) -> str:
    texts = [str(v) for v in values]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def every_rule(files: Sequence[PolicyFile]) -> tuple[Rule, ...]:
    """All rules in the one order that does not depend on the order of files or rules."""
    return tuple(sorted((r for f in files for r in f.rules), key=lambda r: r.ref))
