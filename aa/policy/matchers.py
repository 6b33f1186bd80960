"""Matchers of everything but connections: names, tools, programs, files, MCP calls, models, listeners.

Each answers its question twice: `matches` quickly, `why` in words. Both go through the
same conditions in the same order.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aa.model import Effect
from aa.policy.address import Place, Range
from aa.policy.arguments import Predicate
from aa.policy.network import listed
from aa.policy.pathname import PathPattern, components
from aa.policy.pattern import HostPattern, Matcher

Json = Any

Answer = tuple[bool, str]

_ALLOW = Effect.ALLOW


class Access(enum.StrEnum):
    """What is done to a file."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"  # unlink, and the old name of a rename


class ToolQuestion(NamedTuple):
    name: str
    arguments: Json


class McpQuestion(NamedTuple):
    server: str
    method: str
    tool: str  # "" for methods that call none
    arguments: Json


class LlmQuestion(NamedTuple):
    provider: str
    model: str


class InboundQuestion(NamedTuple):
    """A connection to a port that the run listens on."""

    peer: Place
    port: int


class PathQuestion(NamedTuple):
    """A path, and what of it lies below the run's home. None: the home is not known."""

    path: str
    parts: tuple[str, ...]
    below_home: tuple[str, ...] | None
    home_known: bool
    access: Access | None = None
    """None for a program that is started."""


@dataclass(frozen=True, slots=True)
class Names:
    """Globs of names, one of which must fit."""

    texts: tuple[str, ...]
    tests: tuple[Matcher, ...]

    def matches(self, name: str) -> bool:
        return any(test(name) for test in self.tests)

    def __str__(self) -> str:
        return listed(self.texts)


def _predicates(
    predicates: Sequence[Predicate], arguments: Json, effect: Effect
) -> Predicate | None:
    """The first predicate that does not hold. What is missing counts against the agent."""
    against = effect is not _ALLOW
    for p in predicates:
        if not p.holds(arguments, against=against):
            return p
    return None


@dataclass(frozen=True, slots=True)
class ToolMatcher:
    """`names` are tests of the whole name; all predicates must hold."""

    names: tuple[str, ...]
    tests: tuple[Matcher, ...]
    predicates: tuple[Predicate, ...]
    effect: Effect

    def matches(self, q: ToolQuestion) -> bool:
        return any(test(q.name) for test in self.tests) and self.matches_rest(q)

    def matches_rest(self, q: ToolQuestion) -> bool:
        """The same for a question whose name is known to match."""
        return not self.predicates or _predicates(self.predicates, q.arguments, self.effect) is None

    def why(self, q: ToolQuestion) -> Answer:
        if not any(test(q.name) for test in self.tests):
            return False, f"none of its names ({listed(self.names)}) matches"
        failed = _predicates(self.predicates, q.arguments, self.effect)
        if failed is not None:
            return False, f"the argument does not fulfil {failed}"
        return True, "name and arguments fit" if self.predicates else "the name fits"


@dataclass(frozen=True, slots=True)
class McpMatcher:
    """A call to an MCP server. A part that is None is not looked at.

    With `tool` or `predicates` it is about calls of tools alone.
    """

    server: Names | None
    method: Names | None
    tool: Names | None
    predicates: tuple[Predicate, ...]
    effect: Effect

    def matches(self, q: McpQuestion) -> bool:
        return self.why(q)[0]

    def why(self, q: McpQuestion) -> Answer:
        parts = (("server", self.server, q.server), ("method", self.method, q.method))
        for name, wanted, given in (*parts, ("tool", self.tool, q.tool)):
            if wanted is not None and not (given and wanted.matches(given)):
                return False, f"its {name} is {wanted}, not {given or '-'}"
        if self.predicates and not q.tool:
            return False, "it is about arguments of tools, and this calls none"
        failed = _predicates(self.predicates, q.arguments, self.effect)
        if failed is not None:
            return False, f"the argument does not fulfil {failed}"
        return True, "the call fits"


@dataclass(frozen=True, slots=True)
class LlmMatcher:
    """A request to a model. A part that is None is not looked at."""

    provider: Names | None
    model: Names | None

    def matches(self, q: LlmQuestion) -> bool:
        return self.why(q)[0]

    def why(self, q: LlmQuestion) -> Answer:
        for name, wanted, given in (
            ("provider", self.provider, q.provider),
            ("model", self.model, q.model),
        ):
            if wanted is not None and not wanted.matches(given):
                return False, f"its {name} is {wanted}, not {given}"
        return True, "provider and model fit"


@dataclass(frozen=True, slots=True)
class DnsMatcher:
    """A name that a run asks to be resolved."""

    names: tuple[HostPattern, ...]

    def matches(self, name: str) -> bool:
        return any(p.matches(name) for p in self.names)

    def why(self, name: str) -> Answer:
        if self.matches(name):
            return True, f"its names match {name}"
        return False, f"none of its names ({listed(self.names)}) matches {name}"


@dataclass(frozen=True, slots=True)
class InboundMatcher:
    """Connections from some addresses to listeners of the run; `ports` is None for all of them."""

    ranges: tuple[Range, ...]
    ports: frozenset[int] | None

    def matches(self, q: InboundQuestion) -> bool:
        return self.why(q)[0]

    def why(self, q: InboundQuestion) -> Answer:
        if self.ports is not None and q.port not in self.ports:
            return False, f"its ports are {listed(sorted(self.ports))}, not {q.port}"
        if not any(r.contains(q.peer) for r in self.ranges):
            ranges = listed(r.text for r in self.ranges)
            return False, f"{q.peer.text} is in none of its cidrs ({ranges})"
        return True, f"{q.peer.text} to port {q.port} fits"


@dataclass(frozen=True, slots=True)
class ExecMatcher:
    """Programs by the paths that they are started from."""

    paths: tuple[PathPattern, ...]
    effect: Effect

    def matches(self, q: PathQuestion) -> bool:
        return path_matches(self.paths, q, self.effect)

    def why(self, q: PathQuestion) -> Answer:
        if self.matches(q):
            return True, "the path fits"
        return False, f"none of its paths ({listed(self.paths)}) matches"


@dataclass(frozen=True, slots=True)
class FileMatcher:
    """Files by their paths, and what may be, or may not be, done to them."""

    paths: tuple[PathPattern, ...]
    access: frozenset[Access]
    effect: Effect

    def matches(self, q: PathQuestion) -> bool:
        return q.access in self.access and path_matches(self.paths, q, self.effect)

    def why(self, q: PathQuestion) -> Answer:
        if q.access not in self.access:
            return False, f"it is about {listed(sorted(self.access))}, not {q.access}"
        if self.matches(q):
            return True, f"path and access ({q.access}) fit"
        return False, f"none of its paths ({listed(self.paths)}) matches {q.path}"


def path_matches(patterns: Sequence[PathPattern], q: PathQuestion, effect: Effect) -> bool:
    """Where the home is not known, any folder may be it, for a rule that denies."""
    for p in patterns:
        if not p.home:
            if p.matches(q.parts):
                return True
        elif q.home_known:
            if q.below_home is not None and p.matches(q.below_home):
                return True
        elif effect is not Effect.ALLOW and any(
            p.matches(q.parts[n:]) for n in range(len(q.parts))
        ):
            return True
    return False


def path_question(path: str, home: str, access: Access | None = None) -> PathQuestion:
    """`path` is absolute and in its normal form; `home` may be ""."""
    known = home.startswith("/")
    below = None
    if known:
        top = home.rstrip("/")
        if path == top or path.startswith(top + "/"):
            below = components(path[len(top) :])
    return PathQuestion(path, components(path), below, known, access)
