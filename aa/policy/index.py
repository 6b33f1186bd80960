"""Finds the rules that can match a question without looking at the others.

Hosts by exact name and by suffix, names by the literal beginning of a glob, addresses by
prefix, paths by their first components. Candidates come in the order of the rules' names, so
the rule that a decision names does not depend on where it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from aa.model import Action
from aa.policy.address import Place, Range
from aa.policy.matchers import (
    InboundQuestion,
    LlmQuestion,
    McpQuestion,
    Names,
    PathQuestion,
    ToolQuestion,
)
from aa.policy.network import NetworkQuestion, Request
from aa.policy.pathname import PathPattern
from aa.policy.pattern import Depth, HostPattern, Matcher, glob, is_glob, literal_prefix
from aa.policy.questions import network_questions
from aa.policy.rules import Rule, Section
from aa.policy.weigh import Pair, Requested, requested

KEPT_LIMIT = 4096
"""Questions whose candidates are remembered; then the memory starts anew."""
NAME_LENGTH_LIMIT = 256
"""Characters of a name that is worth remembering."""
ADDRESSES_KEPT = 8
"""Addresses of a connection that is worth remembering."""
PATHS_SEARCHED = 8
"""Rules about paths of one connection; more are not tried one by one."""

Bucket = dict[str, list[int]]
Rules = tuple[Rule, ...]
K = TypeVar("K")
T = TypeVar("T")


class Hosts:
    """Numbers by patterns of hosts."""

    def __init__(self) -> None:
        self._exact: Bucket = {}
        self._one: Bucket = {}
        self._any: Bucket = {}
        self._every: list[int] = []  # hosts = ["**"]

    def add(self, number: int, patterns: Iterable[HostPattern]) -> None:
        for pattern in patterns:
            if pattern.depth is Depth.ANY and not pattern.suffix:
                self._every.append(number)
            else:
                buckets = (self._exact, self._one, self._any)
                buckets[pattern.depth].setdefault(pattern.suffix, []).append(number)

    def find(self, name: str) -> list[int]:
        found = [*self._every, *self._exact.get(name, ())]
        dot = name.find(".")
        if dot >= 0:
            found += self._one.get(name[dot + 1 :], ())
        while dot >= 0:
            found += self._any.get(name[dot + 1 :], ())
            dot = name.find(".", dot + 1)
        return found


class Ranges:
    """Numbers by address ranges."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple[int, int], dict[int, list[int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def add(self, number: int, ranges: Iterable[Range]) -> None:
        for r in ranges:
            at = self._prefixes.setdefault((r.version, r.shift), {})
            at.setdefault(r.first, []).append(number)

    def find(self, where: Place) -> list[int]:
        found: list[int] = []
        for place in (where, where.inner):
            if place is not None:
                for (version, shift), prefixes in self._prefixes.items():
                    if version == place.version:
                        found += prefixes.get(place.number >> shift, ())
        return found


class Globs:
    """Numbers by names with wildcards."""

    def __init__(self) -> None:
        self._exact: Bucket = {}
        self._tests: dict[int, dict[str, list[tuple[Matcher, int]]]] = {}
        """By the length of the literal beginning."""

    def add(self, number: int, names: Iterable[str]) -> None:
        for name in names:
            if is_glob(name):
                beginning = literal_prefix(name)
                at = self._tests.setdefault(len(beginning), {})
                at.setdefault(beginning, []).append((glob(name), number))
            else:
                self._exact.setdefault(name, []).append(number)

    def find(self, name: str) -> list[int]:
        found = [*self._exact.get(name, ())]
        for length, beginnings in self._tests.items():
            found += [number for test, number in beginnings.get(name[:length], ()) if test(name)]
        return found


class Paths:
    """Numbers by patterns of paths: by the components before the first wildcard."""

    def __init__(self) -> None:
        self._absolute: dict[tuple[str, ...], list[int]] = {}
        self._home: dict[tuple[str, ...], list[int]] = {}
        self._homes: list[int] = []
        self._deepest = 0

    def add(self, number: int, patterns: Iterable[PathPattern]) -> None:
        for pattern in patterns:
            at = self._home if pattern.home else self._absolute
            at.setdefault(pattern.literal, []).append(number)
            self._deepest = max(self._deepest, len(pattern.literal))
            if pattern.home:
                self._homes.append(number)

    def find(self, parts: Sequence[str]) -> list[int]:
        return self._below(self._absolute, parts)

    def find_file(self, q: PathQuestion) -> list[int]:
        found = self.find(q.parts)
        if q.below_home is not None:
            found += self._below(self._home, q.below_home)
        elif not q.home_known:
            found += self._homes
        return found

    def _below(self, at: dict[tuple[str, ...], list[int]], parts: Sequence[str]) -> list[int]:
        found: list[int] = []
        if at:
            whole = tuple(parts)
            for length in range(min(len(whole), self._deepest) + 1):
                found += at.get(whole[:length], ())
        return found


class Matched:
    """The rules that match a connection to one address, whatever the run and the time. Many ends
    share one of these."""

    __slots__ = ("_pairs", "_paths", "_plain", "_timed")

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        self._pairs = pairs
        self._timed = any(rule.when is not None for rule, _ in pairs)
        self._paths: Paths | None = None
        self._plain: frozenset[int] = frozenset()
        networks = [rule.network for rule, _ in pairs]
        with_paths = [(i, n.paths) for i, n in enumerate(networks) if n is not None and n.paths]
        if len(with_paths) > PATHS_SEARCHED:
            self._paths = Paths()
            for number, paths in with_paths:
                self._paths.add(number, paths)
            self._plain = frozenset(range(len(pairs))) - {number for number, _ in with_paths}

    def pairs(self, now: float) -> Sequence[Pair]:
        if not self._timed:
            return self._pairs
        return [pair for pair in self._pairs if pair[0].holds(now)]

    def pairs_of(self, request: Request, now: float) -> Sequence[Pair]:
        """Those that can match a request."""
        # An ambiguous path fits every denial, so then all are looked at.
        if self._paths is None or not request.path:
            return self.pairs(now)
        numbers = self._plain.union(self._paths.find(request.parts))
        found = [self._pairs[n] for n in sorted(numbers)]
        return [pair for pair in found if pair[0].holds(now)] if self._timed else found


Ends = tuple[tuple[NetworkQuestion, Matched], ...]
"""A connection, by its addresses."""


class RuleIndex:
    """An index over rules that are given in the order in which they are to be found.

    `bits` are files; `now` is in seconds since the epoch.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._hosts = Hosts()
        self._ranges = Ranges()  # of network rules without hosts
        self._names = Hosts()
        self._inbound = Ranges()
        self._exec = Paths()
        self._file = Paths()
        self._tool = Globs()
        self._mcp_tool = Globs()
        self._mcp_server = Globs()
        self._mcp_rest: list[int] = []
        self._model = Globs()
        self._provider = Globs()
        for number, rule in enumerate(self._rules):
            self._add(number, rule)
        self._find: Mapping[Section, Callable[[Any], Rules]] = {
            Section.DNS: self._dns_rules,
            Section.INBOUND: self._inbound_rules,
            Section.EXEC: self._exec_rules,
            Section.FILE: self._file_rules,
            Section.MCP: self._mcp_rules,
            Section.LLM: self._llm_rules,
        }
        self._end_memory: dict[tuple[Any, ...], Ends] = {}
        self._shared_rules: dict[tuple[int, ...], Rules] = {}
        self._shared_matches: dict[tuple[int, ...], Matched] = {}
        self._host_memory: dict[str, Rules] = {}
        self._name_memory: dict[str, Rules] = {}
        self._tool_memory: dict[str, Rules] = {}
        self._mcp_memory: dict[tuple[str, str], Rules] = {}
        self._llm_memory: dict[LlmQuestion, Rules] = {}

    # -- finding

    def tools(self, q: ToolQuestion, bits: int, now: float) -> list[Rule]:
        """The tool rules that match a call."""
        found = self._tool_memory.get(q.name)
        if found is None:
            found = self._ordered(self._tool.find(q.name))
            _remember(self._tool_memory, q.name, found, len(q.name))
        return [
            rule
            for rule in found
            if rule.bit & bits
            and (rule.when is None or rule.holds(now))
            and rule.matcher.matches_rest(q)
        ]

    def matching(self, section: Section, q: Any, bits: int, now: float) -> list[Rule]:
        """The rules of a section, other than network, that match a question."""
        return [
            rule
            for rule in self._find[section](q)
            if rule.bit & bits and rule.holds(now) and rule.matcher.matches(q)
        ]

    def connections(
        self, action: Action, bits: int, now: float
    ) -> list[tuple[NetworkQuestion, Sequence[Pair]]]:
        """The rules that match a connection, for each of its addresses; of other files too.

        Raises Malformed or InvalidHost.
        """
        return [(q, matched.pairs(now)) for q, matched in self._ends(action)]

    def requests(
        self, action: Action, request: Request, bits: int, now: float
    ) -> list[tuple[NetworkQuestion, Requested]]:
        """The rules that match a request. Raises Malformed or InvalidHost."""
        return [
            (q, requested(matched.pairs_of(request, now), request, bits))
            for q, matched in self._ends(action)
        ]

    def hosts(self, name: str, bits: int, now: float) -> list[Rule]:
        """The network rules with a host pattern that matches a name."""
        return [r for r in self._host_rules(name) if r.bit & bits and r.holds(now)]

    def about(self, action: Action) -> list[tuple[NetworkQuestion, Rules]]:
        """The network rules about the host or the address of a connection, whatever else they say."""
        return [(q, self._network_rules(q)) for q in network_questions(action)]

    # -- candidates

    def _ends(self, action: Action) -> Ends:
        a = action.attributes
        addresses, port, answered = a.get("addresses"), a.get("port"), a.get("answered")
        kind = type(addresses)
        key = None
        if (
            addresses is None
            or ((kind is list or kind is tuple) and len(addresses) <= ADDRESSES_KEPT)
        ) and (answered is None or (type(answered) is str and len(answered) <= NAME_LENGTH_LIMIT)):
            key = (
                action.target,
                a.get("host"),
                port,
                type(port),  # 443 is not 443.0
                a.get("protocol"),
                answered,
                a.get("own_listener") is True,
                None if addresses is None else tuple(addresses),
            )
            try:
                found = self._end_memory.get(key)
            except TypeError:  # something in it is no text
                key = found = None
            if found is not None:
                return found
        ends = tuple((q, self._matched(q)) for q in network_questions(action))
        if key is not None:
            _remember(self._end_memory, key, ends, len(action.target))
        return ends

    def _matched(self, q: NetworkQuestion) -> Matched:
        found: list[Pair] = []
        key: list[int] = []
        for rule in self._network_rules(q):
            assert rule.network is not None
            match = rule.network.match_rest(q)
            if match:
                found.append((rule, match))
                key += (id(rule), match)
        shared = self._shared_matches.get(tuple(key))
        if shared is None:
            shared = Matched(tuple(found))
            _remember(self._shared_matches, tuple(key), shared, 0)
        return shared

    def _network_rules(self, q: NetworkQuestion) -> Rules:
        numbers = self._ranges.find(q.place) if q.place is not None else []
        if not numbers:
            return self._host_rules(q.host) if q.host else ()
        return self._ordered(numbers + self._hosts.find(q.host) if q.host else numbers)

    def _host_rules(self, name: str) -> Rules:
        found = self._host_memory.get(name)
        if found is None:
            found = self._ordered(self._hosts.find(name))
            _remember(self._host_memory, name, found, len(name))
        return found

    def _dns_rules(self, name: str) -> Rules:
        found = self._name_memory.get(name)
        if found is None:
            found = self._ordered(self._names.find(name))
            _remember(self._name_memory, name, found, len(name))
        return found

    def _inbound_rules(self, q: InboundQuestion) -> Rules:
        return self._ordered(self._inbound.find(q.peer))

    def _exec_rules(self, q: PathQuestion) -> Rules:
        return self._ordered(self._exec.find_file(q))

    def _file_rules(self, q: PathQuestion) -> Rules:
        return self._ordered(self._file.find_file(q))

    def _mcp_rules(self, q: McpQuestion) -> Rules:
        key = (q.server, q.tool)
        found = self._mcp_memory.get(key)
        if found is None:
            numbers = self._mcp_server.find(q.server) + self._mcp_tool.find(q.tool)
            found = self._ordered(numbers + self._mcp_rest)
            _remember(self._mcp_memory, key, found, len(q.server) + len(q.tool))
        return found

    def _llm_rules(self, q: LlmQuestion) -> Rules:
        found = self._llm_memory.get(q)
        if found is None:
            found = self._ordered(self._provider.find(q.provider) + self._model.find(q.model))
            _remember(self._llm_memory, q, found, len(q.provider) + len(q.model))
        return found

    # -- filling

    def _add(self, number: int, rule: Rule) -> None:
        if rule.network is not None:
            self._hosts.add(number, rule.network.hosts)
            if not rule.network.hosts:
                self._ranges.add(number, rule.network.ranges)
        elif rule.dns is not None:
            self._names.add(number, rule.dns.names)
        elif rule.inbound is not None:
            self._inbound.add(number, rule.inbound.ranges)
        elif rule.exec is not None:
            self._exec.add(number, rule.exec.paths)
        elif rule.file is not None:
            self._file.add(number, rule.file.paths)
        elif rule.tool is not None:
            self._tool.add(number, rule.tool.names)
        elif rule.mcp is not None:
            ways = ((rule.mcp.tool, self._mcp_tool), (rule.mcp.server, self._mcp_server))
            if not _add_first(number, ways):
                self._mcp_rest.append(number)
        elif rule.llm is not None:
            ways = ((rule.llm.model, self._model), (rule.llm.provider, self._provider))
            _add_first(number, ways)

    def _ordered(self, numbers: Iterable[int]) -> Rules:
        """In the rules' order. Many names have the same rules, so these are kept once."""
        key = tuple(sorted(set(numbers)))
        shared = self._shared_rules.get(key)
        if shared is None:
            shared = tuple(self._rules[n] for n in key)
            _remember(self._shared_rules, key, shared, 0)
        return shared


def _add_first(number: int, ways: Iterable[tuple[Names | None, Globs]]) -> bool:
    """Adds a rule by the first of its parts that it has."""
    for names, at in ways:
        if names is not None:
            at.add(number, names.texts)
            return True
    return False


def _remember(memory: dict[K, T], key: K, found: T, length: int) -> None:
    if len(memory) >= KEPT_LIMIT:
        memory.clear()
    if length <= NAME_LENGTH_LIMIT:
        memory[key] = found
