"""Which rule is sure to match whatever another one does, and which of them can match the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aa.model import Effect
from aa.policy.address import Range, place
from aa.policy.arguments import Predicate
from aa.policy.matchers import FileMatcher, InboundMatcher, LlmMatcher, McpMatcher, Names
from aa.policy.network import NetworkMatcher
from aa.policy.pathname import PathPattern
from aa.policy.pattern import HostPattern, Matcher, is_glob
from aa.policy.rules import Rule


def covers(wide: Rule, narrow: Rule) -> bool:
    """Whether the first rule is sure to match whatever the second one does. False where it is not
    plain."""
    if wide.section is not narrow.section:
        return False
    if wide.when is not None and wide.when != narrow.when:
        return False
    if wide.network is not None and narrow.network is not None:
        return _network(wide.network, narrow.network)
    if wide.dns is not None and narrow.dns is not None:
        return _hosts(wide.dns.names, narrow.dns.names)
    if wide.inbound is not None and narrow.inbound is not None:
        return _inbound(wide.inbound, narrow.inbound)
    if wide.exec is not None and narrow.exec is not None:
        return _paths(wide.exec.paths, narrow.exec.paths)
    if wide.file is not None and narrow.file is not None:
        return _files(wide.file, narrow.file)
    if wide.tool is not None and narrow.tool is not None:
        names = _texts(wide.tool.names, wide.tool.tests, narrow.tool.names)
        return names and _arguments(wide, narrow)
    if wide.mcp is not None and narrow.mcp is not None:
        return _mcp(wide.mcp, narrow.mcp) and _arguments(wide, narrow)
    if wide.llm is not None and narrow.llm is not None:
        return _llm(wide.llm, narrow.llm)
    return False


def share_hosts(one: NetworkMatcher, other: NetworkMatcher) -> bool:
    """Whether a connection can match the hosts and ports of both."""
    if one.ports is not None and other.ports is not None and not one.ports & other.ports:
        return False
    if not one.hosts or not other.hosts:
        return not one.hosts and not other.hosts
    # Patterns of names are nested in each other or have nothing in common.
    return any(a.covers(b) or b.covers(a) for a in one.hosts for b in other.hosts)


# -- the network -------------------------------------------------------------------------------


def _network(wide: NetworkMatcher, narrow: NetworkMatcher) -> bool:
    if wide.ports is not None and (narrow.ports is None or not narrow.ports <= wide.ports):
        return False
    if wide.protocol != "any" and wide.protocol != narrow.protocol:
        return False
    if narrow.inspects and not wide.inspects and wide.effect is not Effect.DENY:
        return False
    if wide.hosts and not (narrow.hosts and _hosts(wide.hosts, narrow.hosts)):
        return False
    if not wide.hosts and narrow.hosts and wide.effect is not Effect.DENY:
        return False  # a rule about addresses alone opens no name
    if not content(wide, narrow):
        return False
    if wide.ranges:
        return bool(narrow.ranges) and all(_in_one(n, wide.ranges) for n in narrow.ranges)
    # What names ranges lifts the guard, which a rule without them does not.
    return not narrow.ranges or wide.effect is Effect.DENY


def content(wide: NetworkMatcher, narrow: NetworkMatcher) -> bool:
    """The same for what they say of requests alone."""
    if wide.methods is not None and not (narrow.methods and narrow.methods <= wide.methods):
        return False
    if wide.paths and not (narrow.paths and _paths(wide.paths, narrow.paths)):
        return False
    wanted = {(h.name, h.text) for h in wide.headers}
    if not wanted <= {(h.name, h.text) for h in narrow.headers}:
        return False
    return wide.body in (None, narrow.body) and wide.ws in (None, narrow.ws)


def _hosts(wide: Sequence[HostPattern], narrow: Sequence[HostPattern]) -> bool:
    return all(any(w.covers(n) for w in wide) for n in narrow)


def _in_one(narrow: Range, ranges: Iterable[Range]) -> bool:
    return any(
        _contains(w, narrow)
        # 10.0.0.0/7 contains 10.0.0.0/8 and yet does not lift its guard.
        and (w.length == narrow.length or not lifts_guard(narrow) or lifts_guard(w))
        for w in ranges
    )


def _contains(wide: Range, narrow: Range) -> bool:
    return (
        wide.version == narrow.version
        and wide.length <= narrow.length
        and narrow.first >> (narrow.length - wide.length) == wide.first
    )


def lifts_guard(r: Range) -> bool:
    """Whether a range names addresses of the guard list."""
    guarded = place(r.text.partition("/")[0])
    return bool(guarded.guard) and r.length >= guarded.guard_length


def _inbound(wide: InboundMatcher, narrow: InboundMatcher) -> bool:
    if wide.ports is not None and (narrow.ports is None or not narrow.ports <= wide.ports):
        return False
    return all(any(_contains(w, n) for w in wide.ranges) for n in narrow.ranges)


# -- paths and names ---------------------------------------------------------------------------


def _paths(wide: Sequence[PathPattern], narrow: Sequence[PathPattern]) -> bool:
    return all(any(w.covers(n) for w in wide) for n in narrow)


def _files(wide: FileMatcher, narrow: FileMatcher) -> bool:
    return narrow.access <= wide.access and _paths(wide.paths, narrow.paths)


def _mcp(wide: McpMatcher, narrow: McpMatcher) -> bool:
    pairs = (
        (wide.server, narrow.server),
        (wide.method, narrow.method),
        (wide.tool, narrow.tool),
    )
    return all(_names(w, n) for w, n in pairs)


def _llm(wide: LlmMatcher, narrow: LlmMatcher) -> bool:
    return _names(wide.provider, narrow.provider) and _names(wide.model, narrow.model)


def _names(wide: Names | None, narrow: Names | None) -> bool:
    if wide is None:
        return True
    return narrow is not None and _texts(wide.texts, wide.tests, narrow.texts)


def _texts(wide: Sequence[str], tests: Sequence[Matcher], narrow: Sequence[str]) -> bool:
    return all(
        "*" in wide or text in wide or (not is_glob(text) and any(test(text) for test in tests))
        for text in narrow
    )


def _arguments(wide: Rule, narrow: Rule) -> bool:
    a, b = _predicates(wide), _predicates(narrow)
    if a and {str(p) for p in a} - {str(p) for p in b}:
        return False
    return not a or wide.effect is narrow.effect  # they treat missing arguments differently


def _predicates(rule: Rule) -> Sequence[Predicate]:
    found: Any = rule.matcher.predicates
    return tuple(found)
