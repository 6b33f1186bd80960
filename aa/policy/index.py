"""Finds the rules that can match a question without looking at the others.

Hosts by exact name and by suffix, names by the literal beginning of a glob, addresses by
prefix, paths by their first components. Candidates come in the order of the rules' names, so
the rule that a decision names does not depend on where it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from aa.policy.address import Place, Range
from aa.policy.matchers import (
    InboundQuestion,
    LlmQuestion,
    McpQuestion,
    Names,
    PathQuestion,
    ToolQuestion,
)
from aa.policy.network import NetworkQuestion
from aa.policy.pathname import PathPattern
from aa.policy.pattern import Depth, HostPattern, Matcher, glob, is_glob, literal_prefix
from aa.policy.rules import Rule

KEPT_LIMIT = 8192
"""Questions whose candidates are remembered; then the memory starts anew."""
NAME_LENGTH_LIMIT = 256
"""Characters of a name that is worth remembering."""

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


class HostRules:
    """The network rules that name a host: those that look at paths apart from the others."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._plain = [
            n for n, r in enumerate(rules) if r.network is not None and not r.network.paths
        ]
        self._paths = Paths()
        self.with_paths = tuple(r for r in rules if r.network is not None and r.network.paths)
        for n, rule in enumerate(rules):
            if rule.network is not None:
                self._paths.add(n, rule.network.paths)

    def of_path(self, parts: Sequence[str]) -> Sequence[Rule]:
        """The rules that can match a request with this path."""
        if not self.with_paths:
            return self.rules
        numbers = {*self._plain, *self._paths.find(parts)}
        return [self.rules[n] for n in sorted(numbers)]


class RuleIndex:
    """An index over rules that are given in the order in which they are to be found."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._hosts = Hosts()
        self._names = Hosts()
        self._ranges = Ranges()  # of network rules without hosts
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
        self._host_memory: dict[str, HostRules] = {}
        self._name_memory: dict[str, Rules] = {}
        self._tool_memory: dict[str, Rules] = {}
        self._mcp_memory: dict[tuple[str, str], Rules] = {}
        self._llm_memory: dict[tuple[str, str], Rules] = {}

    # -- finding

    def host(self, name: str) -> HostRules:
        """The network rules with a host pattern that matches the name."""
        found = self._host_memory.get(name)
        if found is None:
            found = HostRules(self._ordered(self._hosts.find(name)))
            _remember(self._host_memory, name, found, len(name))
        return found

    def addresses(self, q: NetworkQuestion) -> list[Rule]:
        """The network rules without hosts that name the question's address."""
        if q.place is None or not self._ranges:
            return []
        return list(self._ordered(self._ranges.find(q.place)))

    def names(self, name: str) -> Rules:
        """The dns rules that match a name."""
        found = self._name_memory.get(name)
        if found is None:
            found = self._ordered(self._names.find(name))
            _remember(self._name_memory, name, found, len(name))
        return found

    def inbound(self, q: InboundQuestion) -> Rules:
        return self._ordered(self._inbound.find(q.peer))

    def exec(self, q: PathQuestion) -> Rules:
        return self._ordered(self._exec.find_file(q))

    def file(self, q: PathQuestion) -> Rules:
        return self._ordered(self._file.find_file(q))

    def tool(self, q: ToolQuestion) -> Rules:
        """The tool rules whose names match."""
        found = self._tool_memory.get(q.name)
        if found is None:
            found = self._ordered(self._tool.find(q.name))
            _remember(self._tool_memory, q.name, found, len(q.name))
        return found

    def mcp(self, q: McpQuestion) -> Rules:
        key = (q.server, q.tool)
        found = self._mcp_memory.get(key)
        if found is None:
            numbers = self._mcp_server.find(q.server) + self._mcp_tool.find(q.tool)
            found = self._ordered(numbers + self._mcp_rest)
            _remember(self._mcp_memory, key, found, len(q.server) + len(q.tool))
        return found

    def llm(self, q: LlmQuestion) -> Rules:
        key = (q.provider, q.model)
        found = self._llm_memory.get(key)
        if found is None:
            found = self._ordered(self._provider.find(q.provider) + self._model.find(q.model))
            _remember(self._llm_memory, key, found, len(q.provider) + len(q.model))
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
            self._add_first(
                number, (rule.mcp.tool, self._mcp_tool), (rule.mcp.server, self._mcp_server)
            )
        elif rule.llm is not None:
            self._add_first(
                number, (rule.llm.model, self._model), (rule.llm.provider, self._provider)
            )

    def _add_first(self, number: int, *ways: tuple[Names | None, Globs]) -> None:
        for names, at in ways:
            if names is not None:
                at.add(number, names.texts)
                return
        self._mcp_rest.append(number)

    def _ordered(self, numbers: Iterable[int]) -> Rules:
        return tuple(self._rules[n] for n in sorted(set(numbers)))


def _remember(memory: dict[K, T], key: K, found: T, length: int) -> None:
    if len(memory) >= KEPT_LIMIT:
        memory.clear()
    if length <= NAME_LENGTH_LIMIT:
        memory[key] = found
