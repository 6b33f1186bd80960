"""Reads the rules of a file that fits the schema: what is wrong all the same is told with key and remedy."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from aa.model import Effect
from aa.policy import approve, when
from aa.policy.address import Range
from aa.policy.arguments import OPERATORS, Predicate, contradiction, predicate
from aa.policy.content import DETECTORS, IN, OUT, detectors
from aa.policy.matchers import (
    Access,
    DnsMatcher,
    ExecMatcher,
    FileMatcher,
    InboundMatcher,
    LlmMatcher,
    McpMatcher,
    Names,
    ToolMatcher,
)
from aa.policy.network import DEFAULT_PORTS, BodyMatcher, HeaderPattern, NetworkMatcher, WsMatcher
from aa.policy.pathname import PathPattern, file_pattern, request_pattern
from aa.policy.pattern import HostPattern, InvalidPattern, glob, host_pattern
from aa.policy.rules import Rule, Section
from aa.policy.sandbox import size
from aa.tomlfile import Document, KeyPath, Problem, did_you_mean

Json = Any

INSPECT_LIMIT_MOST = 256 << 20
"""Bytes of a body that a worker may be asked to keep."""
HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")

CREDENTIAL_HEADERS = frozenset(
    """
    authorization proxy-authorization cookie set-cookie x-api-key api-key x-goog-api-key
    x-auth-token x-amz-security-token x-csrf-token x-vault-token private-token
    """.split()
)
"""Their values must not reach the gateway or the log, so no rule can look at them."""

KERNEL = (Section.EXEC, Section.FILE, Section.INBOUND)
"""What the kernel or the firewall decides, which cannot wait for a person."""

CALLS_TOOL = "tools/call"
"""The one method of MCP that has a tool and arguments."""


class Mark:
    """Where in a document a rule stands, and where its problems go."""

    def __init__(self, document: Document, number: int, problems: list[Problem]) -> None:
        self.document = document
        self.number = number
        self._problems = problems

    def problem(self, path: Sequence[str | int], message: str, fix: str = "") -> None:
        whole: KeyPath = ("rule", self.number, *path)
        self._problems.append(self.document.problem(whole, message, fix))


def rules_of(
    document: Document, policy: str, number: int, problems: list[Problem]
) -> Iterator[Rule]:
    """The rules of a file, which is the one with this number among all."""
    seen: set[str] = set()
    for index, written in enumerate(document.data.get("rule", ())):
        path: KeyPath = ("rule", index)
        if written["id"] in seen:
            message = f"{written['id']!r} is the id of a rule before it too"
            problems.append(document.problem((*path, "id"), message, "give it another"))
        seen.add(written["id"])
        mark = Mark(document, index, problems)
        before = len(problems)
        rule = _rule(mark, policy, number, written)
        if rule is not None and len(problems) == before:
            yield rule


def _rule(mark: Mark, policy: str, number: int, written: Mapping[str, Json]) -> Rule | None:
    sections = [section for section in Section if section.value in written]
    if len(sections) != 1:
        message = "has two matchers" if sections else "has no matcher, and none never means all"
        known = ", ".join(section.value for section in Section)
        mark.problem((), message, f"each rule has one of {known}")
        return None
    (section,) = sections
    effect = Effect(written["effect"])
    if effect is Effect.ASK and section in KERNEL:
        message = f"the kernel cannot wait for a person, so {section.value} cannot be asked about"
        mark.problem(("effect",), message, "use deny or allow")
        return None
    asked = None
    if "approve" in written:
        if effect is not Effect.ASK:
            mark.problem(("approve",), "is of ask rules alone", 'write effect = "ask" or remove it')
        asked = approve.read(
            written["approve"],
            lambda key, message, fix: mark.problem(("approve", key), message, fix),
        )
    time = None
    if "when" in written:
        time = when.read(
            written["when"], lambda path, message, fix: mark.problem(("when", *path), message, fix)
        )
    matcher = _READERS[section](mark, written[section.value], effect)
    if matcher is None:
        return None
    return Rule(
        ref=f"{policy}/{written['id']}",
        id=written["id"],
        effect=effect,
        reason=written.get("reason", ""),
        section=section,
        file_number=number,
        bit=1 << number,
        document=mark.document,
        number=mark.number,
        when=time,
        approve=asked,
        **{section.value: matcher},
    )


# -- network -----------------------------------------------------------------------------------


def _network(mark: Mark, written: Mapping[str, Json], effect: Effect) -> NetworkMatcher | None:
    key = Section.NETWORK.value
    hosts = tuple(_hosts(mark, key, "hosts", written))
    ranges = tuple(_ranges(mark, key, written))
    if "hosts" not in written and "cidrs" not in written:
        mark.problem((key,), "names neither hosts nor cidrs", 'hosts = ["**"] is every name')
        return None
    ports = frozenset(written["ports"]) if "ports" in written else None
    if ports is None and effect is not Effect.DENY:
        ports = DEFAULT_PORTS
    _check_content(mark, written, effect)
    deny, slash = effect is Effect.DENY, effect is Effect.ALLOW
    read = functools.partial(request_pattern, whole=deny, slash=slash)
    paths = tuple(_paths(mark, (key, "paths"), written, read))
    return NetworkMatcher(
        hosts,
        ranges,
        ports,
        _protocol(written, effect),
        effect,
        methods=frozenset(written["methods"]) if "methods" in written else None,
        paths=paths,
        headers=tuple(_headers(mark, written.get("headers", {}))),
        body=_body(mark, written["body"]) if "body" in written else None,
        ws=_ws(written["ws"]) if "ws" in written else None,
        inspect="inspect" in written,
        inspect_limit=_inspect_limit(mark, written),
    )


def _protocol(written: Mapping[str, Json], effect: Effect) -> str:
    """A rule that opens a name opens it for TLS and HTTP, where the name is in the bytes; other
    protocols need a word of their own. A rule about addresses alone, and a denial, mean all."""
    if "protocol" in written:
        return str(written["protocol"])
    looks_inside = "inspect" in written or CONTENT & written.keys()
    return "web" if effect is not Effect.DENY and ("hosts" in written or looks_inside) else "any"


CONTENT = frozenset(("methods", "paths", "headers", "body", "ws"))


def _check_content(mark: Mark, written: Mapping[str, Json], effect: Effect) -> None:
    found = [key for key in (*sorted(CONTENT), "inspect") if key in written]
    for key in found:
        if written.get("protocol") == "opaque":
            message = "can never be true: what is opaque has no requests to look into"
            mark.problem(("network", key), message, "remove it, or the protocol")
        if key in ("body", "ws") and effect is Effect.ALLOW:
            message = "is of deny and ask rules alone: what is sent is seen after it was allowed"
            mark.problem(
                ("network", key), message, "allow the request, and deny what must not be in it"
            )
    if effect is Effect.DENY and "inspect" in written:
        message = "is of allow and ask rules alone: a denial inspects nothing"
        mark.problem(("network", "inspect"), message, "remove it")
    if "inspect_limit" in written and not found:
        message = "limits nothing: the rule inspects nothing"
        mark.problem(("network", "inspect_limit"), message, "add inspect = true, or remove it")


def _hosts(
    mark: Mark, section: str, key: str, written: Mapping[str, Json]
) -> Iterator[HostPattern]:
    seen: dict[HostPattern, str] = {}
    wide = False
    for index, text in enumerate(written.get(key, ())):
        path = (section, key, index)
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
        mark.problem((section, "wide"), "confirms nothing: no pattern is wide", "remove it")


def _ranges(mark: Mark, section: str, written: Mapping[str, Json]) -> Iterator[Range]:
    for index, text in enumerate(written.get("cidrs", ())):
        path = (section, "cidrs", index)
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


def _headers(mark: Mark, written: Mapping[str, Json]) -> Iterator[HeaderPattern]:
    seen: dict[str, str] = {}
    for written_name, value in written.items():
        path = ("network", "headers", written_name)
        name = written_name.lower()
        if not HEADER.fullmatch(written_name):
            mark.problem(path, "is not the name of a header", "write it as in X-Api-Version")
        elif name in CREDENTIAL_HEADERS:
            message = "holds a credential, which must not leave the proxy"
            mark.problem(path, message, "remove it; [[secret]] puts credentials into requests")
        elif name == "host":
            mark.problem(path, "is compared by hosts", "remove it and write hosts = [...]")
        elif name in seen:
            mark.problem(path, f"is {seen[name]!r} once more", "remove it")
        elif not isinstance(value, str) or not value:
            mark.problem(path, "must be a text that is not empty", 'write it as in "2024*"')
        elif value != value.strip() or any(ord(c) < 0x20 or ord(c) == 0x7F for c in value):
            mark.problem(path, "can never be true: no value begins or ends so", "correct it")
        else:
            yield HeaderPattern(name, value, glob(value))
        seen[name] = written_name


def _body(mark: Mark, written: Mapping[str, Json]) -> BodyMatcher:
    secrets = tuple(written.get("secrets", ()))
    for index, name in enumerate(secrets):
        try:
            detectors((name,))
        except ValueError as e:
            fix = did_you_mean(name, (*DETECTORS, "any"))
            mark.problem(("network", "body", "secrets", index), str(e), fix)
    return BodyMatcher(secrets, _texts(written.get("text", ())))


def _ws(written: Mapping[str, Json]) -> WsMatcher:
    directions = (written["direction"],) if "direction" in written else (OUT, IN)
    return WsMatcher(directions, _texts(written.get("text", ())))


def _inspect_limit(mark: Mark, written: Mapping[str, Json]) -> int | None:
    if "inspect_limit" not in written:
        return None
    limit = size(written["inspect_limit"])
    if limit > INSPECT_LIMIT_MOST:
        message = f"{written['inspect_limit']!r} is more than {INSPECT_LIMIT_MOST} bytes"
        mark.problem(("network", "inspect_limit"), message, "use less")
    return limit


def _inbound(mark: Mark, written: Mapping[str, Json], _effect: Effect) -> InboundMatcher:
    ranges = tuple(_ranges(mark, Section.INBOUND.value, written))
    return InboundMatcher(ranges, frozenset(written["ports"]) if "ports" in written else None)


def _dns(mark: Mark, written: Mapping[str, Json], _effect: Effect) -> DnsMatcher:
    return DnsMatcher(tuple(_hosts(mark, Section.DNS.value, "names", written)))


# -- programs and files ------------------------------------------------------------------------


def _paths(
    mark: Mark,
    key: tuple[str, str],
    written: Mapping[str, Json],
    read: Callable[[str], PathPattern],
) -> Iterator[PathPattern]:
    for index, text in enumerate(written.get("paths", ())):
        try:
            yield read(text)
        except InvalidPattern as e:
            mark.problem((*key, index), str(e), e.fix)


def _exec(mark: Mark, written: Mapping[str, Json], effect: Effect) -> ExecMatcher:
    whole = effect is Effect.DENY
    read = _paths(mark, ("exec", "paths"), written, lambda text: file_pattern(text, whole=whole))
    return ExecMatcher(tuple(read), effect)


def _file(mark: Mark, written: Mapping[str, Json], effect: Effect) -> FileMatcher:
    whole = effect is Effect.DENY
    if "access" not in written and effect is Effect.ALLOW:
        fix = 'write access = ["read"], or what else it allows'
        mark.problem(("file",), "does not say what it allows to be done", fix)
    access = frozenset(Access(a) for a in written.get("access", Access))
    read = _paths(mark, ("file", "paths"), written, lambda text: file_pattern(text, whole=whole))
    return FileMatcher(tuple(read), access, effect)


# -- tools, MCP calls and models ---------------------------------------------------------------


def _tool(mark: Mark, written: Mapping[str, Json], effect: Effect) -> ToolMatcher:
    predicates = _predicates(mark, "tool", written)
    names = tuple(written["names"])
    return ToolMatcher(names, tuple(glob(name) for name in names), predicates, effect)


def _mcp(mark: Mark, written: Mapping[str, Json], effect: Effect) -> McpMatcher:
    predicates = _predicates(mark, "mcp", written)
    method = _names(written, "method")
    for key in ("tool", "args"):
        if key in written and method is not None and not method.matches(CALLS_TOOL):
            message = f"can never be true: only {CALLS_TOOL} has it, which method does not match"
            mark.problem(("mcp", key), message, "remove it, or method")
    return McpMatcher(
        _names(written, "server"), method, _names(written, "tool"), predicates, effect
    )


def _llm(_mark: Mark, written: Mapping[str, Json], _effect: Effect) -> LlmMatcher:
    return LlmMatcher(_names(written, "provider"), _names(written, "model"))


def _names(written: Mapping[str, Json], key: str) -> Names | None:
    if key not in written:
        return None
    texts = _texts(written[key])
    return Names(texts, tuple(glob(text) for text in texts))


def _texts(written: str | Sequence[str]) -> tuple[str, ...]:
    return (written,) if isinstance(written, str) else tuple(written)


def _predicates(mark: Mark, section: str, written: Mapping[str, Json]) -> tuple[Predicate, ...]:
    found: list[Predicate] = []
    if "args" in written:
        _arguments(mark, (section, "args"), written["args"], (), found)
    return tuple(found)


def _arguments(
    mark: Mark,
    top: tuple[str, str],
    table: Mapping[str, Json],
    path: tuple[str, ...],
    found: list[Predicate],
) -> None:
    """Reads a table of arguments: a table with only tables in it leads further down, one with
    anything else in it holds operators."""
    for name, value in table.items():
        here = (*path, name)
        key = (*top, *here)
        if not isinstance(value, dict):
            fix = f"write {name} = {{ eq = ... }}"
            mark.problem(key, f"must be a table of operators: {', '.join(OPERATORS)}", fix)
        elif not value:
            mark.problem(key, "is an empty table, and empty never means everything", "remove it")
        elif all(isinstance(v, dict) for v in value.values()):
            _arguments(mark, top, value, here, found)
        else:
            _operators(mark, top, value, here, found)


def _operators(
    mark: Mark,
    top: tuple[str, str],
    table: Mapping[str, Json],
    path: tuple[str, ...],
    found: list[Predicate],
) -> None:
    mine: list[Predicate] = []
    for operator, operand in table.items():
        key = (*top, *path, operator)
        if operator not in OPERATORS:
            mark.problem(key, "unknown operator", did_you_mean(operator, OPERATORS))
            continue
        try:
            mine.append(predicate(path, operator, operand))
        except ValueError as e:
            mark.problem(key, str(e))
    against = contradiction(mine)
    if against:
        mark.problem((*top, *path), f"can never be true: {against}", "correct it")
    found += mine


_READERS: Mapping[Section, Callable[[Mark, Mapping[str, Json], Effect], Any]] = {
    Section.NETWORK: _network,
    Section.INBOUND: _inbound,
    Section.DNS: _dns,
    Section.EXEC: _exec,
    Section.FILE: _file,
    Section.TOOL: _tool,
    Section.MCP: _mcp,
    Section.LLM: _llm,
}
