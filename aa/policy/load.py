"""Reads policy files: all of them or none, every mistake with file, line, key and what to do."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa.config import folder_problem
from aa.model import Effect, Mode
from aa.policy.address import Range
from aa.policy.arguments import OPERATORS, Predicate, contradiction, predicate
from aa.policy.engine import Policy
from aa.policy.limits import limits_of
from aa.policy.pattern import HostPattern, InvalidPattern, glob, host_pattern
from aa.policy.rules import (
    DEFAULT_PORTS,
    NetworkMatcher,
    PolicyFile,
    Rule,
    Section,
    Selector,
    ToolMatcher,
)
from aa.tomlfile import (
    Document,
    InvalidFile,
    KeyPath,
    Problem,
    did_you_mean,
    parse,
    read,
    schema,
    validate,
)

Json = Any

FILES_LIMIT = 256
"""Files of one policy."""
RULES_LIMIT = 20_000
"""Rules of one policy."""
HASH_LENGTH = 12
"""Hex digits of the hash in a revision."""
REVISION_LENGTH = 120
"""Characters of a revision; it is in every record."""


def load(source: Path | Iterable[Path], *, owners: Collection[int] | None = None) -> Policy:
    """Reads a folder's `*.toml` files, or the files given, as one policy.

    An empty folder is a policy without files, which denies everything. Raises
    InvalidFile with every problem of every file. `owners` is as for `aa.tomlfile.read`.
    """
    texts: list[tuple[str, bytes]] = []
    problems: list[Problem] = []
    for path in _paths(source):
        try:
            texts.append((str(path), read(path, owners=owners)))
        except FileNotFoundError:
            problems.append(Problem(str(path), 1, "", "is gone or a dangling link", "remove it"))
        except InvalidFile as e:
            problems += e.problems
    return _policy(texts, problems)


def loads(texts: Mapping[str, str | bytes]) -> Policy:
    """The same for texts in memory, by file name."""
    return _policy(list(texts.items()), [])


def _paths(source: Path | Iterable[Path]) -> list[Path]:
    if not isinstance(source, Path):
        return list(source)
    if source.is_file():
        return [source]
    try:
        found = sorted(p for p in source.iterdir() if p.suffix == ".toml" and p.name[0] != ".")
    except OSError as e:
        fix = "create it, or make it readable for aa-gateway"
        raise InvalidFile([Problem(str(source), 1, "", f"{e.strerror}", fix)]) from e
    if len(found) > FILES_LIMIT:
        message = f"has more than {FILES_LIMIT} files"
        raise InvalidFile([Problem(str(source), 1, "", message, "merge some")])
    return found


def _policy(texts: Sequence[tuple[str, str | bytes]], problems: list[Problem]) -> Policy:
    files: list[PolicyFile] = []
    for name, text in texts:
        try:
            document = parse(text, file=name)
            files.append(_file(document, len(files)))
        except InvalidFile as e:
            problems += e.problems
    if not problems:
        problems += _collisions(files)
    if problems:
        raise InvalidFile(problems)
    return Policy(files, _revision(files))


def _collisions(files: Sequence[PolicyFile]) -> Iterator[Problem]:
    seen: dict[str, PolicyFile] = {}
    for f in files:
        if f.id in seen:
            message = f"{f.id!r} is the id of {seen[f.id].path} too"
            yield Problem(f.path, 1, "policy.id", message, "give each file its own id")
        seen[f.id] = f
    count = sum(len(f.rules) for f in files)
    if count > RULES_LIMIT:
        message = f"there are {count} rules, more than {RULES_LIMIT}"
        yield Problem(files[-1].path, 1, "rule", message, "use patterns")


def _revision(files: Sequence[PolicyFile]) -> str:
    """A hash of what the files say, whatever they are called, and the revisions they give."""
    if not files:
        return ""
    together = "\n".join(sorted(f.digest for f in files))
    short = hashlib.sha256(together.encode()).hexdigest()[:HASH_LENGTH]
    named = ",".join(f"{f.id}@{f.revision}" for f in sorted(files, key=_by_id) if f.revision)
    text = f"{short}:{named}" if named else short
    return text if len(text) <= REVISION_LENGTH else text[: REVISION_LENGTH - 3] + "..."


def _by_id(file: PolicyFile) -> str:
    return file.id


# -- one file ----------------------------------------------------------------------------------


def _file(document: Document, number: int) -> PolicyFile:
    if not document.data:
        raise InvalidFile([document.problem((), "is empty", "write a policy or remove the file")])
    problems = validate(document, schema("policy"))
    if problems:
        raise InvalidFile(problems)
    head = document.data["policy"]
    rules = tuple(_rules(document, head["id"], number, problems))
    writable = _writable(document, problems)
    mode = Mode(head.get("mode", "enforce"))
    limits = tuple(limits_of(document, head["id"], mode, problems))
    if problems:
        raise InvalidFile(sorted(problems, key=lambda p: p.line))
    applies = {k: frozenset(v) for k, v in head.get("applies_to", {}).items()}
    defaults = {Section(name): value for name, value in head.get("default", {}).items()}
    return PolicyFile(
        path=document.file,
        id=head["id"],
        revision=str(head.get("revision", "")),
        mode=mode,
        applies_to=Selector(**applies),
        defaults=defaults,
        rules=rules,
        writable=writable,
        limits=limits,
        document=document,
    )


def _writable(document: Document, problems: list[Problem]) -> tuple[str, ...] | None:
    folders = document.data.get("sandbox", {}).get("writable")
    for index, folder in enumerate(folders or ()):
        problem = None if folder == "." else folder_problem(folder)
        if problem:
            problems.append(document.problem(("sandbox", "writable", index), *problem))
    return None if folders is None else tuple(folders)


def _rules(document: Document, policy: str, number: int, problems: list[Problem]) -> Iterator[Rule]:
    seen: set[str] = set()
    for index, written in enumerate(document.data.get("rule", ())):
        path: KeyPath = ("rule", index)
        if written["id"] in seen:
            message = f"{written['id']!r} is the id of a rule before it too"
            problems.append(document.problem((*path, "id"), message, "give it another"))
        seen.add(written["id"])
        mark = _Mark(document, index, problems)
        before = len(problems)
        rule = _rule(mark, policy, number, written)
        if rule is not None and len(problems) == before:
            yield rule


class _Mark:
    """Where in a document a rule stands, and where its problems go."""

    def __init__(self, document: Document, number: int, problems: list[Problem]) -> None:
        self.document = document
        self.number = number
        self._problems = problems

    def problem(self, path: Sequence[str | int], message: str, fix: str = "") -> None:
        whole: KeyPath = ("rule", self.number, *path)
        self._problems.append(self.document.problem(whole, message, fix))


def _rule(mark: _Mark, policy: str, number: int, written: Mapping[str, Json]) -> Rule | None:
    matchers = [name for name in ("network", "tool") if name in written]
    if len(matchers) != 1:
        message = "has two matchers" if matchers else "has no matcher, and none never means all"
        mark.problem((), message, "each rule has either network = {...} or tool = {...}")
        return None
    effect = Effect(written["effect"])
    network = tool = None
    if "network" in written:
        network = _network(mark, written["network"], effect)
    else:
        tool = _tool(mark, written["tool"], effect)
    return Rule(
        ref=f"{policy}/{written['id']}",
        id=written["id"],
        effect=effect,
        reason=written.get("reason", ""),
        section=Section(matchers[0]),
        network=network,
        tool=tool,
        file=number,
        bit=1 << number,
        document=mark.document,
        number=mark.number,
    )


# -- network -----------------------------------------------------------------------------------


def _network(mark: _Mark, written: Mapping[str, Json], effect: Effect) -> NetworkMatcher | None:
    hosts = tuple(_hosts(mark, written))
    ranges = tuple(_ranges(mark, written.get("cidrs", ())))
    if "hosts" not in written and "cidrs" not in written:
        mark.problem(("network",), "names neither hosts nor cidrs", 'hosts = ["**"] is every name')
        return None
    ports = frozenset(written["ports"]) if "ports" in written else None
    if ports is None and effect is not Effect.DENY:
        ports = DEFAULT_PORTS
    return NetworkMatcher(hosts, ranges, ports, _protocol(written, effect), effect)


def _protocol(written: Mapping[str, Json], effect: Effect) -> str:
    """A rule that opens a name opens it for TLS and HTTP, where the name is in the bytes; other
    protocols need a word of their own. A rule about addresses alone, and a denial, mean all."""
    if "protocol" in written:
        return str(written["protocol"])
    return "web" if "hosts" in written and effect is not Effect.DENY else "any"


def _hosts(mark: _Mark, written: Mapping[str, Json]) -> Iterator[HostPattern]:
    seen: dict[HostPattern, str] = {}
    wide = False
    for index, text in enumerate(written.get("hosts", ())):
        path = ("network", "hosts", index)
        try:
            pattern = host_pattern(text)
        except InvalidPattern as e:
            mark.problem(path, str(e), e.fix)
            continue
        wide = wide or pattern.wide
        if pattern.wide and "wide" not in written:
            message = f"{text!r} spans names of people who have nothing to do with each other"
            mark.problem(path, message, "narrow it, or confirm it with wide = true")
        if pattern in seen:
            mark.problem(path, f"{text!r} is {seen[pattern]!r} once more", "remove it")
        seen[pattern] = text
        yield pattern
    if "wide" in written and not wide:
        mark.problem(("network", "wide"), "confirms nothing: no pattern is wide", "remove it")


def _ranges(mark: _Mark, texts: Sequence[str]) -> Iterator[Range]:
    for index, text in enumerate(texts):
        path = ("network", "cidrs", index)
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            mark.problem(path, f"{text!r} is not a range of addresses", _range_fix(text))
            continue
        if isinstance(network, ipaddress.IPv6Network) and "%" in text:
            mark.problem(path, f"{text!r} has a zone", "remove it")
        elif network.version == 6 and network.subnet_of(_MAPPED):
            message = f"{text!r} is IPv4 written as IPv6"
            mark.problem(path, message, "write the IPv4 range; it is about both forms")
        else:
            yield Range.of(network)


_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def _range_fix(text: str) -> str:
    try:
        return f'write "{ipaddress.ip_network(text, strict=False)}"'
    except ValueError:
        return 'write it as in "10.0.0.0/8" or "fd00::/64"; names belong in hosts'


# -- tools -------------------------------------------------------------------------------------


def _tool(mark: _Mark, written: Mapping[str, Json], effect: Effect) -> ToolMatcher:
    predicates: list[Predicate] = []
    if "args" in written:
        _arguments(mark, written["args"], (), predicates)
    names = tuple(written["names"])
    return ToolMatcher(names, tuple(glob(name) for name in names), tuple(predicates), effect)


def _arguments(
    mark: _Mark, table: Mapping[str, Json], path: tuple[str, ...], found: list[Predicate]
) -> None:
    """Reads a table of arguments: a table with only tables in it leads further down, one with
    anything else in it holds operators."""
    for name, value in table.items():
        here = (*path, name)
        key = ("tool", "args", *here)
        if not isinstance(value, dict):
            fix = f"write {name} = {{ eq = ... }}"
            mark.problem(key, f"must be a table of operators: {', '.join(OPERATORS)}", fix)
        elif not value:
            mark.problem(key, "is an empty table, and empty never means everything", "remove it")
        elif all(isinstance(v, dict) for v in value.values()):
            _arguments(mark, value, here, found)
        else:
            _operators(mark, value, here, found)


def _operators(
    mark: _Mark, table: Mapping[str, Json], path: tuple[str, ...], found: list[Predicate]
) -> None:
    mine: list[Predicate] = []
    for operator, operand in table.items():
        key = ("tool", "args", *path, operator)
        if operator not in OPERATORS:
            mark.problem(key, "unknown operator", did_you_mean(operator, OPERATORS))
            continue
        try:
            mine.append(predicate(path, operator, operand))
        except ValueError as e:
            mark.problem(key, str(e))
    against = contradiction(mine)
    if against:
        mark.problem(("tool", "args", *path), f"can never be true: {against}", "correct it")
    found += mine
