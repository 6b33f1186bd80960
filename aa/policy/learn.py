"""Proposes the least policy under which what a run did is allowed. Pure: questions in, a text out.

The text is for a person to read: what a run did is not what it should have done. It is a file that
loads, and every act it was made from is asked of it again; what it does not allow is named in it.
Names are not generalised; a host's paths are when there are several, folders when there are several
files in them.

What the kernel layer saw becomes rules too: programs that were started, and folders that were written
to. What was only read is not in the log, and stays up to the user's rights.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aa.config import folder_problem
from aa.model import Effect, Kind, Run
from aa.policy.address import Place
from aa.policy.engine import Policy
from aa.policy.questions import Malformed, llm_question, mcp_question, network_questions
from aa.policy.host import InvalidHost, canonical_host
from aa.policy.load import loads
from aa.policy.pathname import AmbiguousPath, normal_path
from aa.policy.replay import Question
from aa.policy.sandbox import WRITABLE_ANYHOW
from aa.tomlfile import InvalidFile

Json = Any
Table = dict[str, Json]

PATHS_LIMIT = 4
"""Paths of one host that are named one by one; with more the rule is about the host."""
FILES_LIMIT = 3
"""Programs of one folder, and folders in one folder, that are named one by one."""
SYSTEM = (
    "/bin",
    "/sbin",
    "/usr/bin",
    "/usr/sbin",
    "/usr/local/bin",
    "/usr/local/sbin",
    "/usr/games",
)
"""Folders whose programs are always named one by one: everything is in them."""
NAMED_LIMIT = 200
"""Acts that a comment names; more are counted."""
SHOWN = 120
"""Characters of what an agent chose that a comment repeats."""

NEVER = frozenset(("metadata", "unspecified", "multicast", "broadcast"))
"""Classes of addresses that no proposal opens, whatever was done: a person can."""
PLAIN_NAME = re.compile(r"[^\x00-\x1f\x7f*?]{1,256}")
PLAIN_PATH = re.compile(r"/[^\x00-\x1f\x7f*?]{0,4000}")

NAMED = (Kind.TOOL_CALL, Kind.MCP_CALL, Kind.LLM_REQUEST)
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
    head = _head(run, done)
    needed = _not_allowed_by(loads({"proposal": _text(head, [], dumps)}), done)
    rules = [r for make in RULES for r in make(needed) if _loads(head, r, dumps)]
    policy = loads({"proposal": _text(head, rules, dumps)})
    allowed = sum(q.count for q in done)
    for q in _not_allowed_by(policy, needed):
        allowed -= q.count
        why = "no rule, and no writable folder, can say it"
        left[q.action.kind.value, q.action.target, why] += q.count
    named = sorted((Left(*what, count) for what, count in left.items()), key=_frequent)
    preface = _preface(run, total, allowed, named)
    text = "\n".join((*preface, "", _text(head, rules, dumps)))
    loads({"proposal": text})
    return Proposal(text, len(rules), total, allowed, tuple(named))


def _not_allowed_by(policy: Policy, done: Sequence[Question]) -> list[Question]:
    return [q for q in done if not policy.decide(q.run, q.action, now=q.now).permits]


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
    if q.seen and "error" in q.told:
        return f"it failed: {q.told['error']}"
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
    try:
        _ = mcp_question(q.action) if kind is Kind.MCP_CALL else None
        _ = llm_question(q.action) if kind is Kind.LLM_REQUEST else None
    except Malformed as e:
        return str(e)
    if kind in NAMED and not _is_text(q.action.target, PLAIN_NAME):
        return "its name is not one that a rule can have"
    if q.seen and not _is_text(q.action.target, PLAIN_PATH):
        return "its path is not one that a rule can have"
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
        paths = _normal_paths(path for _, path in end.requests)
        if paths is not None and len(paths) <= PATHS_LIMIT:
            network["paths"] = paths
    else:
        network |= _protocol(end.protocol)
    if any(p.guard for p in end.places.values()):
        network["cidrs"] = sorted({_range(p) for p in end.places.values()})
    return network


def _normal_paths(paths: Iterable[str]) -> list[str] | None:
    """Paths as a rule has them; None when one of them is not to be named."""
    try:
        found = sorted({normal_path(path) for path in paths})
    except AmbiguousPath:
        return None
    return None if any(re.search(r"[*?#%\x00-\x20\x7f]", path) for path in found) else found


def _range(p: Place) -> str:
    return f"{p.text}/{32 if p.version == 4 else 128}"


def _protocol(protocol: str) -> Table:
    return {"protocol": protocol} if protocol else {}


def _name_rules(done: Sequence[Question]) -> Iterator[Table]:
    """Names that were resolved and not connected to: those that were need no rule of their own."""
    hosts = {end.host for end in _ends(done)}
    asked = {q.action.target.rstrip(".").lower() for q in done if q.action.kind is Kind.DNS_QUERY}
    names = sorted(name for name in asked - hosts if _is_name(name))
    if names:
        yield _rule("resolved-only", "dns", {"names": names})


def _is_name(name: str) -> bool:
    try:
        return not canonical_host(name).is_address
    except InvalidHost:
        return False


# -- tools, MCP servers and models -------------------------------------------------------------


def _tool_rules(done: Sequence[Question]) -> Iterator[Table]:
    names = sorted({q.action.target for q in done if q.action.kind is Kind.TOOL_CALL})
    if names:
        yield _rule("tools", "tool", {"names": names})


def _mcp_rules(done: Sequence[Question]) -> Iterator[Table]:
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for q in done:
        if q.action.kind is Kind.MCP_CALL:
            asked = mcp_question(q.action)
            found[asked.server, asked.method] |= {asked.tool} - {""}
    for (server, method), tools in sorted(found.items()):
        matcher: Table = {"server": server, "method": method}
        yield _rule(f"mcp-{server}", "mcp", matcher | ({"tool": sorted(tools)} if tools else {}))


def _model_rules(done: Sequence[Question]) -> Iterator[Table]:
    found: dict[str, set[str]] = defaultdict(set)
    for q in done:
        if q.action.kind is Kind.LLM_REQUEST:
            asked = llm_question(q.action)
            found[asked.provider].add(asked.model)
    for provider, models in sorted(found.items()):
        yield _rule(f"models-{provider}", "llm", {"provider": provider, "model": sorted(models)})


# -- programs and files ------------------------------------------------------------------------


def _program_rules(done: Sequence[Question]) -> Iterator[Table]:
    """A program by the path that it was asked for, and the file that the kernel ran for it."""
    found: set[str] = set()
    home = next((q.run.home for q in done), "")
    for q in done:
        if q.action.kind is Kind.EXEC:
            found.add(q.action.target)
            ran = q.told.get("exe")
            if isinstance(ran, str) and _is_text(ran, PLAIN_PATH):
                found.add(posixpath.normpath(ran))
    by_folder: dict[str, set[str]] = defaultdict(set)
    for path in found:
        by_folder[posixpath.dirname(path)].add(path)
    paths: set[str] = set()
    for folder, programs in by_folder.items():
        several = len(programs) > FILES_LIMIT and folder not in (*SYSTEM, "/")
        paths |= {f"{folder}/**"} if several else programs
    if paths:
        yield _rule("programs", "exec", {"paths": sorted(_of_home(p, home) for p in paths)})


def _writable(run: Run, done: Sequence[Question]) -> list[str]:
    """The folders that were written to: `.`, and as few others as the rest is in."""
    written: set[str] = set()
    inside = False
    for q in done:
        if q.action.kind not in (Kind.FILE_OPEN, Kind.FILE_UNLINK, Kind.FILE_RENAME):
            continue
        for path in (q.action.target, q.action.attributes.get("to")):
            if not isinstance(path, str) or _is_below(path, WRITABLE_ANYHOW):
                continue
            if run.directory and _is_below(path, (run.directory,)):
                inside = True
            elif not _is_below(
                run.home, (posixpath.dirname(path),)
            ):  # a home is never all writable
                written.add(_of_home(posixpath.dirname(path), run.home))
    folders = {folder for folder in _merged(written) if folder_problem(folder) is None}
    return [*(["."] if inside or not folders else []), *sorted(folders)]


def _merged(folders: set[str]) -> set[str]:
    """With the folder around them where there are several in it, and without those in others."""
    merged = set(folders)
    while True:
        around: dict[str, set[str]] = defaultdict(set)
        for folder in merged:
            around[posixpath.dirname(folder)].add(folder)
        several = {
            top: inner
            for top, inner in around.items()
            if len(inner) > FILES_LIMIT and folder_problem(top) is None
        }
        if not several:
            break
        for top, inner in several.items():
            merged = merged - inner | {top}
    return {f for f in merged if not any(f != top and _is_below(f, (top,)) for top in merged)}


def _is_below(path: str, tops: Iterable[str]) -> bool:
    return any(path == top or path.startswith(top.rstrip("/") + "/") for top in tops)


def _of_home(path: str, home: str) -> str:
    return f"~{path[len(home) :]}" if home.count("/") > 1 and path.startswith(home + "/") else path


# -- the file ----------------------------------------------------------------------------------


def _rule(name: str, section: str, matcher: Table) -> Table:
    id_ = re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:64].lstrip("_.-") or "rule"
    return {"id": id_, "effect": "allow", section: matcher}


def _head(run: Run, done: Sequence[Question]) -> Table:
    """With defaults that deny what the log tells of."""
    kinds = {q.action.kind for q in done}
    default = {"network": "deny", "dns": "deny", "tool": "deny", "mcp": "deny", "file": "sandbox"}
    if Kind.LLM_REQUEST in kinds:
        default["llm"] = "deny"
    if Kind.EXEC in kinds:
        default["exec"] = "deny"
    who = {"agents": [run.agent]} if run.agent else {"users": [run.user]}
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.id) or "run"
    return {
        "policy": {
            "id": f"learned-{name}"[:64],
            "applies_to": who,
            "default": default,
        },
        "sandbox": {"writable": _writable(run, done)},
    }


RULES: tuple[Callable[[Sequence[Question]], Iterator[Table]], ...] = (
    _network_rules,
    _name_rules,
    _tool_rules,
    _mcp_rules,
    _model_rules,
    _program_rules,
)
"""What makes the rules of a proposal of what a run did."""


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
    yield "# Names are exact. A host with several paths, and a folder with several programs, is allowed"
    yield "# as a whole. Reading files, and what a run without the layer `proxy` connects to, is not learned."
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
