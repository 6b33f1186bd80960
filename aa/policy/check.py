"""What a person should look at in a policy that is valid: rules without effect, and openings that may not be meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aa.model import Effect, Mode
from aa.policy.address import Range, place
from aa.policy.pattern import Depth
from aa.policy.matchers import ToolMatcher
from aa.policy.network import NetworkMatcher
from aa.policy.rules import PolicyFile, Rule, Section

Json = Any

PAIRS_LIMIT = 2_000_000
"""Pairs of rules that are compared; in a larger policy shadowed rules are not looked for."""

OPAQUE_PORTS = {22: "ssh", 25: "smtp", 3306: "mysql", 5432: "postgresql", 6379: "redis"}
"""Ports whose usual protocol is neither TLS nor HTTP from the first byte on."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to look at. `severity` is `warning` (it may not be meant) or `advice`."""

    severity: str
    file: str
    line: int
    key: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f" ({self.fix})" if self.fix else ""
        return f"{self.file}:{self.line}: {self.severity}: {self.key}: {self.message}{fix}"

    def as_json(self) -> dict[str, Json]:
        return {
            "severity": self.severity,
            "file": self.file,
            "line": self.line,
            "key": self.key,
            "message": self.message,
            "fix": self.fix,
        }


def findings(files: Sequence[PolicyFile]) -> list[Finding]:
    """All findings, by file and line."""
    found: list[Finding] = []
    for f in files:
        for rule in f.rules:
            found += _of_rule(f, rule)
        found += _of_defaults(f)
    found += _overruled_defaults(files)
    found += _shadowed(files)
    return sorted(found, key=lambda x: (x.file, x.line, x.key, x.message))


def _about(severity: str, f: PolicyFile, rule: Rule, message: str, fix: str = "") -> Finding:
    return Finding(severity, f.path, rule.line, rule.ref, message, fix)


def _of_rule(f: PolicyFile, rule: Rule) -> Iterator[Finding]:
    if rule.network is not None and rule.effect is not Effect.DENY:
        yield from _openings(f, rule, rule.network)
    if rule.tool is not None and rule.effect is Effect.ALLOW and "*" in rule.tool.names:
        yield _about("warning", f, rule, "allows every tool", "name the tools")


def _openings(f: PolicyFile, rule: Rule, n: NetworkMatcher) -> Iterator[Finding]:
    verb = "allows" if rule.effect is Effect.ALLOW else "asks about"
    if any(h.depth is Depth.ANY and not h.suffix for h in n.hosts):
        yield _about("warning", f, rule, f"{verb} every name (**)", "name the hosts")
    for h in n.hosts:
        if h.wide:
            yield _about("warning", f, rule, f"{verb} names of anybody: {h}", "name the hosts")
    for r in n.ranges:
        guarded = place(r.text.partition("/")[0])
        if guarded.guard and r.length >= guarded.guard_length:
            yield _about("advice", f, rule, f"opens {guarded.guard} addresses: {r.text}")
        elif r.length == 0:
            fix = "guarded addresses still need a range of their own"
            yield _about("warning", f, rule, f"{verb} every address ({r.text})", fix)
    if n.protocol == "web" and n.ports is not None:
        for port in sorted(n.ports & OPAQUE_PORTS.keys()):
            message = f"port {port} is usually {OPAQUE_PORTS[port]}, which this rule does not match"
            yield _about("warning", f, rule, message, 'add protocol = "opaque"')


def _of_defaults(f: PolicyFile) -> Iterator[Finding]:
    def finding(section: Section, message: str, fix: str) -> Finding:
        key = f"policy.default.{section.value}"
        return Finding("warning", f.path, f.line(section), key, message, fix)

    if f.mode is Mode.OBSERVE:
        return
    if f.default(Section.NETWORK) == "allow":
        yield finding(
            Section.NETWORK,
            "whatever no rule is about is allowed, and what a rule denies by name can be reached "
            "by address",
            "deny, and allow what is needed",
        )
    if f.default(Section.DNS) == "allow":
        yield finding(
            Section.DNS,
            "every name is resolved, and names carry data out",
            "deny: names that a rule allows are resolved anyway",
        )


def _overruled_defaults(files: Sequence[PolicyFile]) -> Iterator[Finding]:
    for f in files:
        for section, value in f.defaults.items():
            stricter = [o for o in files if o is not f and section not in o.defaults]
            if value == "allow" and stricter and section in (Section.NETWORK, Section.TOOL):
                others = ", ".join(o.id for o in stricter[:3])
                yield Finding(
                    "advice",
                    f.path,
                    f.line(section),
                    f"policy.default.{section.value}",
                    f"has no effect for runs that {others} applies to as well: it does not state "
                    "one, which means deny",
                    "state it there too",
                )


# -- rules without effect ----------------------------------------------------------------------


def _shadowed(files: Sequence[PolicyFile]) -> Iterator[Finding]:
    """Rules that another one always beats or repeats, where both apply to the same runs."""
    rules = [(f, r) for f in files for r in f.rules]
    if len(rules) ** 2 > PAIRS_LIMIT:
        return
    for f, rule in rules:
        for other_file, other in rules:
            if other is rule or other.section is not rule.section:
                continue
            if not _applies_at_least(other_file, f) or not _covers(other, rule):
                continue
            if _strength(other) > _strength(rule):
                message = f"has no effect: {other.ref} {_VERBS[other.effect]} all of it"
            elif _strength(other) == _strength(rule) and (
                other.ref < rule.ref or not _covers(rule, other)
            ):
                message = f"adds nothing to {other.ref}"
            else:
                continue
            severity = "warning" if other.effect is not rule.effect else "advice"
            yield _about(severity, f, rule, message, "remove it or narrow the other")
            break


_VERBS = {Effect.ALLOW: "allows", Effect.ASK: "asks about", Effect.DENY: "denies"}


def _strength(rule: Rule) -> int:
    return (Effect.ALLOW, Effect.ASK, Effect.DENY).index(rule.effect)


def _applies_at_least(wide: PolicyFile, narrow: PolicyFile) -> bool:
    """Whether the first file binds every run that the second one is about."""
    if wide.mode is Mode.OBSERVE and narrow.mode is Mode.ENFORCE:
        return False
    a, b = wide.applies_to, narrow.applies_to
    parts = ((a.agents, b.agents), (a.users, b.users), (a.tags, b.tags))
    return all(not x or (y and y <= x) for x, y in parts)


def _covers(wide: Rule, narrow: Rule) -> bool:
    """Whether the first rule matches whatever the second one does."""
    if wide.when is not None and wide.when != narrow.when:
        return False
    if wide.network is not None and narrow.network is not None:
        return _network_covers(wide.network, narrow.network)
    if wide.tool is not None and narrow.tool is not None:
        return _tool_covers(wide.tool, narrow.tool)
    return False


def _network_covers(wide: NetworkMatcher, narrow: NetworkMatcher) -> bool:
    if wide.content or wide.inspects != narrow.inspects:
        return False
    if wide.ports is not None and (narrow.ports is None or not narrow.ports <= wide.ports):
        return False
    if wide.protocol != "any" and wide.protocol != narrow.protocol:
        return False
    if wide.hosts and not (
        narrow.hosts and all(any(w.covers(n) for w in wide.hosts) for n in narrow.hosts)
    ):
        return False
    if not wide.hosts and narrow.hosts and wide.effect is not Effect.DENY:
        return False  # a rule about addresses alone opens no name
    if wide.ranges:
        return bool(narrow.ranges) and all(_in_one(n, wide.ranges) for n in narrow.ranges)
    # What names ranges lifts the guard, which a rule without them does not.
    return not narrow.ranges or wide.effect is Effect.DENY


def _in_one(narrow: Range, ranges: Iterable[Range]) -> bool:
    return any(
        w.version == narrow.version
        and w.length <= narrow.length
        and narrow.first >> (narrow.length - w.length) == w.first
        # 10.0.0.0/7 contains 10.0.0.0/8 and yet does not lift its guard.
        and (w.length == narrow.length or not _lifts(narrow) or _lifts(w))
        for w in ranges
    )


def _lifts(r: Range) -> bool:
    guarded = place(r.text.partition("/")[0])
    return bool(guarded.guard) and r.length >= guarded.guard_length


def _tool_covers(wide: ToolMatcher, narrow: ToolMatcher) -> bool:
    if wide.predicates and {str(p) for p in wide.predicates} - {str(p) for p in narrow.predicates}:
        return False
    if wide.predicates and wide.effect is not narrow.effect:
        return False  # they treat missing arguments differently
    return all(
        name in wide.names or ("*" not in name and "?" not in name and _any(wide, name))
        for name in narrow.names
    )


def _any(matcher: ToolMatcher, name: str) -> bool:
    return any(test(name) for test in matcher.tests)
