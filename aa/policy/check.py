"""What a person should look at in a policy that is valid: rules without effect, and openings that may not be meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aa.model import Effect, Mode
from aa.policy.address import place
from aa.policy.cover import covers, lifts_guard, share_hosts
from aa.policy.matchers import Access
from aa.policy.network import NetworkMatcher, listed
from aa.policy.pathname import PathPattern
from aa.policy.pattern import Depth, HostPattern
from aa.policy.rules import UNSTATED, PolicyFile, Rule, Section
from aa.policy.secret import Secret

Json = Any

PAIRS_LIMIT = 2_000_000
"""Pairs of rules of one section that are compared; with more no rule is looked for that another
one makes useless."""

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
        found += _idle(files, f)
        found += _kept_read_only(f)
    found += _overruled_defaults(files)
    found += _shadowed(files)
    found += _not_inspected(files)
    return sorted(found, key=lambda x: (x.file, x.line, x.key, x.message))


def _about(severity: str, f: PolicyFile, rule: Rule, message: str, fix: str = "") -> Finding:
    return Finding(severity, f.path, rule.line, rule.ref, message, fix)


# -- one rule ----------------------------------------------------------------------------------


def _of_rule(f: PolicyFile, rule: Rule) -> Iterator[Finding]:
    if rule.when is not None and rule.when.always:
        yield _about("advice", f, rule, "when is always", "remove it")
    if rule.network is not None:
        if rule.effect is Effect.DENY:
            yield from _shallow(f, rule, rule.network)
        else:
            yield from _openings(f, rule, rule.network)
    elif rule.effect is Effect.ALLOW:
        what = _everything(rule)
        if what:
            yield _about("warning", f, rule, f"allows {what}", "name what is needed")


def _openings(f: PolicyFile, rule: Rule, n: NetworkMatcher) -> Iterator[Finding]:
    verb = "allows" if rule.effect is Effect.ALLOW else "asks about"
    if any(map(_is_every, n.hosts)):
        yield _about("warning", f, rule, f"{verb} every name (**)", "name the hosts")
    for h in n.hosts:
        if h.wide:
            yield _about("warning", f, rule, f"{verb} names of anybody: {h}", "name the hosts")
    for r in n.ranges:
        guarded = place(r.text.partition("/")[0])
        if lifts_guard(r):
            yield _about("advice", f, rule, f"opens {guarded.guard} addresses: {r.text}")
        elif r.length == 0:
            fix = "guarded addresses still need a range of their own"
            yield _about("warning", f, rule, f"{verb} every address ({r.text})", fix)
    if n.protocol == "web" and n.ports is not None:
        for port in sorted(n.ports & OPAQUE_PORTS.keys()):
            message = f"port {port} is usually {OPAQUE_PORTS[port]}, which this rule does not match"
            yield _about("warning", f, rule, message, 'add protocol = "opaque"')


def _shallow(f: PolicyFile, rule: Rule, n: NetworkMatcher) -> Iterator[Finding]:
    for path in n.paths:
        if path.text.endswith("/*"):
            message = f"{path} is about one segment: what lies deeper is not denied"
            yield _about("advice", f, rule, message, f"write {path}* to deny all of it")


def _everything(rule: Rule) -> str:
    """What an allow rule opens that may be more than was meant, or ""."""
    if rule.tool is not None and "*" in rule.tool.names and not rule.tool.predicates:
        return "every tool"
    if rule.dns is not None and any(p.wide or _is_every(p) for p in rule.dns.names):
        return "names of anybody to be resolved, and names carry data out"
    if rule.inbound is not None:
        wide = [r.text for r in rule.inbound.ranges if r.length == 0]
        return f"connections from every address ({listed(wide)})" if wide else ""
    if rule.mcp is not None and rule.mcp.server is None and rule.mcp.method is None:
        return "a tool of every MCP server, whoever runs it"
    if rule.llm is not None and rule.llm.provider is None and "*" in _texts_of_model(rule):
        return "every model"
    if rule.file is not None and rule.file.access & {Access.WRITE, Access.DELETE}:
        wide = [p.text for p in rule.file.paths if not p.literal]
        return f"files to be changed nearly everywhere ({listed(wide)})" if wide else ""
    return ""


def _texts_of_model(rule: Rule) -> Sequence[str]:
    return rule.llm.model.texts if rule.llm is not None and rule.llm.model is not None else ()


def _is_every(pattern: HostPattern) -> bool:
    return pattern.depth is Depth.ANY and not pattern.suffix


# -- defaults ----------------------------------------------------------------------------------


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
            if value == "allow" and stricter and UNSTATED[section] == "deny":
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


def _idle(files: Sequence[PolicyFile], f: PolicyFile) -> Iterator[Finding]:
    """Allow rules about what is allowed anyway, whatever other files say."""
    for rule in f.rules:
        if rule.effect is not Effect.ALLOW or rule.section not in UNSTATED:
            continue
        if any(o.default(rule.section) != "allow" for o in files):
            continue
        if rule.network is not None and (rule.network.inspects or rule.network.ranges):
            continue  # it has requests decided, or lifts the guard
        message = f"changes nothing: the default of {rule.section} is allow"
        fix = f'state {rule.section} = "deny" in policy.default, or remove it'
        yield _about("warning", f, rule, message, fix)


def _kept_read_only(f: PolicyFile) -> Iterator[Finding]:
    for rule in f.rules:
        if rule.file is None or rule.effect is not Effect.ALLOW:
            continue
        changes = rule.file.access & {Access.WRITE, Access.DELETE}
        if changes and all(_is_within(p, f.sandbox.read_only) for p in rule.file.paths):
            message = "does not allow to change it: [sandbox] read_only keeps it as it is"
            yield _about("warning", f, rule, message, "remove one of them")


def _is_within(pattern: PathPattern, folders: Sequence[str]) -> bool:
    top = ("~/" if pattern.home else "/") + "/".join(pattern.literal)
    return any(top == folder or top.startswith(folder + "/") for folder in folders)


def _shadowed(files: Sequence[PolicyFile]) -> Iterator[Finding]:
    """Rules that another one always beats or repeats, where both apply to the same runs."""
    for section in Section:
        rules = [(f, r) for f in files for r in f.rules if r.section is section]
        if len(rules) ** 2 > PAIRS_LIMIT:
            f = files[0]
            message = f"{len(rules)} rules about {section}: too many to look for useless ones"
            yield Finding("advice", f.path, 1, section.value, message)
            continue
        for f, rule in rules:
            others = (r for o, r in rules if r is not rule and _applies_at_least(o, f))
            yield from _useless(f, rule, (r for r in others if covers(r, rule)))
            if rule.network is not None:
                yield from _loosened(f, rule, rule.network, rules)


def _useless(f: PolicyFile, rule: Rule, wider: Iterable[Rule]) -> Iterator[Finding]:
    for other in wider:
        if _strength(other) > _strength(rule):
            message = f"has no effect: {other.ref} {_VERBS[other.effect]} all of it"
        elif _strength(other) == _strength(rule) and (
            other.ref < rule.ref or not covers(rule, other)
        ):
            message = f"adds nothing to {other.ref}"
        else:
            continue
        severity = "warning" if other.effect is not rule.effect else "advice"
        yield _about(severity, f, rule, message, "remove it or narrow the other")
        return


def _loosened(
    f: PolicyFile, rule: Rule, n: NetworkMatcher, rules: Sequence[tuple[PolicyFile, Rule]]
) -> Iterator[Finding]:
    """What a rule says of requests is of no use where another allows every request."""
    if not n.content or rule.effect is Effect.DENY:
        return
    for o, other in rules:
        w = other.network
        if other is rule or w is None or w.content or other.effect is not Effect.ALLOW:
            continue
        if rule.effect is Effect.ALLOW and _applies_at_least(o, f) and other.when is None:
            if share_hosts(w, n) and _same_hosts(w, n):
                message = f"restricts nothing: {other.ref} allows every request to its hosts"
                yield _about("warning", f, rule, message, f"take the hosts out of {other.id}")
                return


def _same_hosts(wide: NetworkMatcher, narrow: NetworkMatcher) -> bool:
    ports = wide.ports is None or (narrow.ports is not None and narrow.ports <= wide.ports)
    hosts = bool(narrow.hosts) and all(any(w.covers(n) for w in wide.hosts) for n in narrow.hosts)
    return ports and hosts and wide.protocol in ("any", "web", narrow.protocol)


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


# -- what nobody looks into --------------------------------------------------------------------


def _not_inspected(files: Sequence[PolicyFile]) -> Iterator[Finding]:
    """Rules about what is inside of requests, where no rule has them inspected."""
    opening = [
        (r, r.network)
        for f in files
        for r in f.rules
        if r.network is not None and r.effect is not Effect.DENY and r.network.protocol != "opaque"
    ]
    inspecting = [(r, n) for r, n in opening if n.inspects]
    for f in files:
        for rule in f.rules:
            n = rule.network
            if n is not None and n.content and not n.inspects:
                yield from _unseen(f, rule, n, opening)
            if rule.llm is not None and not inspecting:
                message = "no rule inspects anything, so no request to a model is seen"
                yield _about("warning", f, rule, message, INSPECT_FIX)
        for secret in f.secrets:
            if not any(_goes_to(secret, n) for _, n in inspecting):
                line = f.document.line(("secret",))
                message = "no rule inspects its hosts, so it is never put into a request"
                yield Finding("warning", f.path, line, secret.ref, message, INSPECT_FIX)


INSPECT_FIX = "add inspect = true to the rule that allows the host"


def _unseen(
    f: PolicyFile,
    rule: Rule,
    n: NetworkMatcher,
    opening: Sequence[tuple[Rule, NetworkMatcher]],
) -> Iterator[Finding]:
    near = [(r, o) for r, o in opening if r is not rule and share_hosts(n, o)]
    if not any(o.inspects for _, o in near):
        message = "nothing inspects the connections that it is about, so it never matches"
        yield _about("warning", f, rule, message, INSPECT_FIX)
        return
    blind = [r.ref for r, o in near if not o.inspects and not _seen(o, near)]
    if blind:
        message = f"does not see what these let through without inspection: {listed(blind)}"
        yield _about("advice", f, rule, message, "inspect = true in them would show it")


def _seen(n: NetworkMatcher, near: Iterable[tuple[Rule, NetworkMatcher]]) -> bool:
    """Whether another rule has all of its hosts inspected."""
    return any(o.inspects and _same_hosts(o, n) for _, o in near)


def _goes_to(secret: Secret, n: NetworkMatcher) -> bool:
    ports = n.ports is None or not n.ports.isdisjoint(secret.ports)
    hosts = any(a.covers(b) or b.covers(a) for a in secret.hosts for b in n.hosts)
    return ports and hosts and n.protocol != "http"
