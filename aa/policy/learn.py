"""Proposes the least policy under which what a run did is allowed. Pure: questions in, a text out.

The text is for a person to read: what a run did is not what it should have done. It is a file that
loads, and every act it was made from is asked of it again; what it does not allow is named in it.
Names are not generalised; a host's paths are when there are several, folders when there are several
files in them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aa.model import Effect, Kind, Run
from aa.policy.address import Place
from aa.policy.questions import Malformed, network_questions
from aa.policy.host import InvalidHost
from aa.policy.load import loads
from aa.policy.replay import Question
from aa.tomlfile import InvalidFile

Json = Any
Table = dict[str, Json]

PATHS_LIMIT = 4
"""Paths of one host that are named one by one; with more the rule is about the host."""
NAMED_LIMIT = 200
"""Acts that a comment names; more are counted."""
SHOWN = 120
"""Characters of what an agent chose that a comment repeats."""

NEVER = frozenset(("metadata", "unspecified", "multicast", "broadcast"))
"""Classes of addresses that no proposal opens, whatever was done: a person can."""
_OUTSIDE = "it is outside of the folders that a run may write to"
REMAINS = {
    Kind.DNS_QUERY: "the name was resolved, but nothing was connected to by it",
    Kind.FILE_OPEN: _OUTSIDE,
    Kind.FILE_UNLINK: _OUTSIDE,
    Kind.FILE_RENAME: _OUTSIDE,
}
"""Why a proposal does not allow an act that is no secret to it."""
TOOL_NAME = re.compile(r"[^\x00-\x1f\x7f*?]{1,256}")

Dumps = Callable[[Table], str]


@dataclass(frozen=True, slots=True)
class Left:
    """Something that a run did and that the proposal does not allow."""

    kind: str
    target: str
    why: str
    count: int

    def as_json(self) -> dict[str, Json]:
        return {"kind": self.kind, "target": self.target, "why": self.why, "count": self.count}


@dataclass(frozen=True, slots=True)
class Proposal:
    """A policy file for a person to read."""

    text: str
    rules: int
    total: int
    """Acts that it was made from."""
    allowed: int
    """Those of them that it allows."""
    left: tuple[Left, ...]
    """What it does not allow, most frequent first."""


@dataclass
class _End:
    """One host or address at one port, as a run used it."""

    host: str
    port: int
    protocol: str
    places: dict[str, Place] = field(default_factory=dict)
    requests: set[tuple[str, str]] = field(default_factory=set)
    """Methods and paths; empty where nobody looked inside."""


def propose(run: Run, questions: Iterable[Question], dumps: Dumps) -> Proposal:
    """`questions` are what this run did; `dumps` writes TOML."""
    done: list[Question] = []
    left: dict[tuple[str, str, str], int] = defaultdict(int)
    total = allowed = 0
    for q in questions:
        total += q.count
        why = _refusal(q) or _unfit(q)
        if why:
            left[q.action.kind.value, q.action.target, why] += q.count
        else:
            done.append(q)
    head = _head(run)
    rules = [r for r in (*_network_rules(done), *_tool_rules(done)) if _loads(head, r, dumps)]
    policy = loads({"proposal": _text(head, rules, dumps)})
    for q in done:
        if policy.decide(q.run, q.action, now=q.now).permits:
            allowed += q.count
        else:
            why = REMAINS.get(q.action.kind, "no rule of this version can say it")
            left[q.action.kind.value, q.action.target, why] += q.count
    named = sorted((Left(*what, count) for what, count in left.items()), key=_frequent)
    preface = _preface(run, total, allowed, named)
    text = "\n".join((*preface, "", _text(head, rules, dumps)))
    loads({"proposal": text})
    return Proposal(text, len(rules), total, allowed, tuple(named))


def _loads(head: Table, rule: Table, dumps: Dumps) -> bool:
    """Whether a rule is one: what an agent chose can be something that no rule may say."""
    try:
        loads({"proposal": _text(head, [rule], dumps)})
    except InvalidFile:
        return False
    return True


def _frequent(left: Left) -> tuple[Json, ...]:
    return -left.count, left.kind, left.target, left.why


def _refusal(q: Question) -> str:
    """Why an act is not to be allowed although it was done: somebody wrote a rule against it."""
    if q.effect is not Effect.ALLOW:
        return f"it was refused, by {q.rule}"
    if q.would in (Effect.DENY, Effect.ASK) and not q.rule.startswith("<"):
        return f"{q.rule} would {'deny it' if q.would is Effect.DENY else 'ask a person'}"
    return ""


def _unfit(q: Question) -> str:
    """Why no rule could say what was done."""
    kind = q.action.kind
    if kind in (Kind.NET_CONNECT, Kind.HTTP_REQUEST):
        try:
            questions = network_questions(q.action)
        except (Malformed, InvalidHost) as e:
            return str(e)
        for n in questions:
            if n.place is not None and n.place.guard in NEVER:
                return f"{n.place.text} is a {n.place.guard} address"
    if kind is Kind.TOOL_CALL and not _is_text(q.action.target, TOOL_NAME):
        return "the tool's name is not one that a rule can have"
    return ""


def _is_text(text: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(text) is not None and _encodable(text)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- the network -------------------------------------------------------------------------------


def _network_rules(done: Sequence[Question]) -> Iterator[Table]:
    ends = _ends(done)
    inspected = {(e.host, e.port) for e in ends if e.requests}
    together: dict[tuple[int, str], list[str]] = defaultdict(list)
    ranges: dict[tuple[int, str], set[str]] = defaultdict(set)
    alone: list[_End] = []
    for end in ends:
        guarded = any(p.guard for p in end.places.values())
        if not end.host:
            ranges[end.port, end.protocol] |= {_range(p) for p in end.places.values()}
        elif end.requests or guarded:
            alone.append(end)
        elif (end.host, end.port) not in inspected:
            together[end.port, end.protocol].append(end.host)
    for (port, protocol), hosts in sorted(together.items()):
        network = {"hosts": sorted(set(hosts)), "ports": [port], **_protocol(protocol)}
        yield _rule(f"{protocol or 'web'}-{port}", "network", network)
    for end in alone:
        yield _rule(f"{end.host}-{end.port}", "network", _one_host(end))
    for (port, protocol), cidrs in sorted(ranges.items()):
        network = {"cidrs": sorted(cidrs), "ports": [port], **_protocol(protocol)}
        yield _rule(f"addresses-{protocol or 'any'}-{port}", "network", network)


def _ends(done: Sequence[Question]) -> list[_End]:
    """What was connected to, in an order that does not depend on when."""
    found: dict[tuple[str, int, str], _End] = {}
    for q in done:
        if q.action.kind not in (Kind.NET_CONNECT, Kind.HTTP_REQUEST):
            continue
        for n in network_questions(q.action):
            key = n.host, n.port, n.protocol
            end = found.setdefault(key, _End(*key))
            if n.place is not None:
                end.places[n.place.text] = n.place
            if q.action.kind is Kind.HTTP_REQUEST:
                end.requests.add(_request(q.action.attributes))
    return [found[key] for key in sorted(found)]


def _request(attributes: Mapping[str, Json]) -> tuple[str, str]:
    return str(attributes.get("method", "")), str(attributes.get("path", ""))


def _one_host(end: _End) -> Table:
    """The matcher of a host that needs a rule of its own."""
    network: Table = {"hosts": [end.host], "ports": [end.port]}
    if end.requests:
        network["methods"] = sorted({method for method, _ in end.requests})
        paths = sorted({path for _, path in end.requests})
        if len(paths) <= PATHS_LIMIT and all(_plain_path(path) for path in paths):
            network["paths"] = paths
    else:
        network |= _protocol(end.protocol)
    if any(p.guard for p in end.places.values()):
        network["cidrs"] = sorted({_range(p) for p in end.places.values()})
    return network


def _plain_path(path: str) -> bool:
    return path.startswith("/") and not re.search(r"[*?\[\]{}\\%\x00-\x20\x7f]", path)


def _range(p: Place) -> str:
    return f"{p.text}/{32 if p.version == 4 else 128}"


def _protocol(protocol: str) -> Table:
    return {"protocol": protocol} if protocol else {}


# -- tools -------------------------------------------------------------------------------------


def _tool_rules(done: Sequence[Question]) -> Iterator[Table]:
    names = sorted({q.action.target for q in done if q.action.kind is Kind.TOOL_CALL})
    if names:
        yield _rule("tools", "tool", {"names": names})


# -- the file ----------------------------------------------------------------------------------


def _rule(name: str, section: str, matcher: Table) -> Table:
    id_ = re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:64].lstrip("_.-") or "rule"
    return {"id": id_, "effect": "allow", section: matcher}


def _head(run: Run) -> Table:
    who = {"agents": [run.agent]} if run.agent else {"users": [run.user]}
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.id) or "run"
    return {
        "policy": {
            "id": f"learned-{name}"[:64],
            "applies_to": who,
            "default": {"network": "deny", "dns": "deny", "tool": "deny", "mcp": "deny"},
        }
    }


def _text(head: Table, rules: Sequence[Table], dumps: Dumps) -> str:
    """Rules in their own order; ids that two of them have are numbered."""
    seen: dict[str, int] = defaultdict(int)
    parts = [dumps(head)]
    for rule in rules:
        seen[rule["id"]] += 1
        number = seen[rule["id"]]
        id_ = rule["id"] if number == 1 else f"{rule['id'][:58]}-{number}"
        parts.append(dumps({"rule": [{**rule, "id": id_}]}))
    return "\n".join(parts)


def _preface(run: Run, total: int, allowed: int, left: Sequence[Left]) -> Iterator[str]:
    yield f"# Proposed from what run {_shown(run.id)} of agent {_shown(run.agent or '-')} did."
    yield "#"
    yield "# Read it before you use it: what an agent did is not what it should have done, and what"
    yield "# it did not do this time is denied. Nothing has been changed by writing this file."
    yield "# Names are exact. A host with several paths is allowed as a whole."
    yield "#"
    yield f"# It allows {allowed} of the {total} acts that it was made from."
    if left:
        yield "# It does not allow:"
    for x in left[:NAMED_LIMIT]:
        times = f" ({x.count} times)" if x.count > 1 else ""
        yield f"#   {x.kind} {_shown(x.target)}{times}: {_shown(x.why)}"
    if len(left) > NAMED_LIMIT:
        yield f"#   and {len(left) - NAMED_LIMIT} more"


def _shown(text: str) -> str:
    """What an agent chose, as part of a comment: printable ASCII, on one line, of bounded length."""
    short = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    return short if short.isascii() and short.isprintable() else ascii(short)[1:-1]
