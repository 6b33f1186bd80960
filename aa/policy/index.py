"""Finds the rules that can match a question without looking at the others.

Hosts by exact name and by suffix, tools by name and by the literal beginning of
a glob, cidrs by prefix. Candidates come in the order of the rules' names, so the
rule that a decision names does not depend on where it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aa.policy.address import Place
from aa.policy.pattern import Depth, is_glob, literal_prefix
from aa.policy.rules import Match, NetworkQuestion, Rule, ToolQuestion

NAMES_LIMIT = 8192
"""Names whose candidates are remembered; then the memory starts anew."""
NAME_LENGTH_LIMIT = 256
"""Characters of a name that is worth remembering."""

Bucket = dict[str, list[int]]


class RuleIndex:
    """An index over rules that are given in the order in which they are to be found."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._exact: Bucket = {}
        self._one: Bucket = {}
        self._any: Bucket = {}
        self._every: list[int] = []  # hosts = ["**"]
        self._ranges: dict[tuple[int, int], dict[int, list[int]]] = {}  # of rules without hosts
        self._tools: Bucket = {}
        self._globs: dict[int, Bucket] = {}  # by the length of the literal beginning
        for number, rule in enumerate(self._rules):
            self._add(number, rule)
        self._hosts_of: dict[str, tuple[Rule, ...]] = {}
        self._tools_of: dict[str, tuple[Rule, ...]] = {}

    def hosts(self, name: str) -> tuple[Rule, ...]:
        """The rules with a host pattern that matches the name."""
        found = self._hosts_of.get(name)
        if found is None:
            found = self._remember(self._hosts_of, name, self._find_hosts(name))
        return found

    def network(self, q: NetworkQuestion, files: int) -> list[tuple[Rule, Match]]:
        """The rules of some files that match a connection."""
        candidates: Sequence[Rule] = self.hosts(q.host) if q.host else ()
        if q.place is not None and self._ranges:
            by_range = self._find_ranges(q.place)
            if by_range:
                numbers = {*by_range, *self._find_hosts(q.host)} if q.host else by_range
                candidates = [self._rules[n] for n in sorted(numbers)]
        found = []
        for rule in candidates:
            if rule.bit & files and rule.network is not None:
                match = rule.network.match_rest(q)
                if match:
                    found.append((rule, match))
        return found

    def tool(self, q: ToolQuestion, files: int) -> list[tuple[Rule, Match]]:
        """The rules of some files that match a tool call."""
        candidates = self._tools_of.get(q.name)
        if candidates is None:
            candidates = self._remember(self._tools_of, q.name, self._find_tools(q.name))
        found = []
        for rule in candidates:
            if rule.bit & files and rule.tool is not None:
                match = rule.tool.match_rest(q)
                if match:
                    found.append((rule, match))
        return found

    # -- filling

    def _add(self, number: int, rule: Rule) -> None:
        if rule.network is not None:
            for pattern in rule.network.hosts:
                if pattern.depth is Depth.ANY and not pattern.suffix:
                    self._every.append(number)
                else:
                    buckets = (self._exact, self._one, self._any)
                    buckets[pattern.depth].setdefault(pattern.suffix, []).append(number)
            if not rule.network.hosts:
                for r in rule.network.ranges:
                    at = self._ranges.setdefault((r.version, r.shift), {})
                    at.setdefault(r.first, []).append(number)
        if rule.tool is not None:
            for name in rule.tool.names:
                if is_glob(name):
                    beginning = literal_prefix(name)
                    bucket = self._globs.setdefault(len(beginning), {})
                    bucket.setdefault(beginning, []).append(number)
                else:
                    self._tools.setdefault(name, []).append(number)

    # -- finding

    def _remember(
        self, memory: dict[str, tuple[Rule, ...]], name: str, numbers: Iterable[int]
    ) -> tuple[Rule, ...]:
        found = tuple(self._rules[n] for n in sorted(set(numbers)))
        if len(memory) >= NAMES_LIMIT:
            memory.clear()
        if len(name) <= NAME_LENGTH_LIMIT:
            memory[name] = found
        return found

    def _find_hosts(self, name: str) -> list[int]:
        found = [*self._every, *self._exact.get(name, ())]
        dot = name.find(".")
        if dot >= 0:
            found += self._one.get(name[dot + 1 :], ())
        while dot >= 0:
            found += self._any.get(name[dot + 1 :], ())
            dot = name.find(".", dot + 1)
        return found

    def _find_ranges(self, where: Place) -> set[int]:
        found: set[int] = set()
        for place in (where, where.inner):
            if place is not None:
                for (version, shift), prefixes in self._ranges.items():
                    if version == place.version:
                        found.update(prefixes.get(place.number >> shift, ()))
        return found

    def _find_tools(self, name: str) -> list[int]:
        found = [*self._tools.get(name, ())]
        for length, bucket in self._globs.items():
            for number in bucket.get(name[:length], ()):
                tool = self._rules[number].tool
                if tool is not None and any(test(name) for test in tool.tests):
                    found.append(number)
        return found
