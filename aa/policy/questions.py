"""Questions: actions in the form that rules compare with. What says nothing, or two things, is refused."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aa.model import Action, Kind, Run
from aa.policy.address import Place, place
from aa.policy.content import IN, OUT
from aa.policy.host import canonical_host
from aa.policy.matchers import (
    Access,
    InboundQuestion,
    LlmQuestion,
    McpQuestion,
    PathQuestion,
    ToolQuestion,
    path_question,
)
from aa.policy.network import NetworkQuestion, Request
from aa.policy.pathname import read_path

Json = Any

ADDRESSES_LIMIT = 256
"""Addresses of one name that are looked at; a name with more is denied."""
NAME_LIMIT = 1024
"""Characters of the name of a server, a method, a tool of MCP, a provider or a model."""
CALLS_TOOL = "tools/call"


class Malformed(ValueError):
    """The action does not say what its kind needs, or says it in two ways."""

    def __init__(self, message: str, rule: str = "<malformed-action>") -> None:
        self.rule = rule
        super().__init__(message)


# -- the network -------------------------------------------------------------------------------


def network_questions(action: Action) -> list[NetworkQuestion]:
    """One question per address; one without an address in the step of names.

    Raises Malformed or InvalidHost for what cannot be decided.
    """
    a = action.attributes
    host, port, addresses = a.get("host"), a.get("port"), a.get("addresses")
    if port is None or (host is None and addresses is None):
        host, port = _from_target(action.target, host, port)
    if type(port) is not int or not 0 < port < 65536:
        raise Malformed("the port must be a whole number from 1 to 65535")
    protocol = a.get("protocol") or ""
    if protocol not in ("", "tls", "http", "opaque"):
        raise Malformed("the protocol must be tls, http or opaque")
    places = None if addresses is None else _places(addresses)
    if host is None:
        assert places is not None
        answered = a.get("answered") if protocol == "opaque" else None
        name, by_address = "" if answered is None else _name_of(answered), True
    else:
        asked = canonical_host(_text(host))
        name, by_address = "" if asked.is_address else asked.text, asked.is_address
        if by_address:
            if places is not None and any(p.text != asked.text for p in places):
                raise Malformed("host is an address, and addresses has another one")
            places = [place(asked.text)]
    if action.target != f"{host}:{port}":
        _same_target(action.target, name, port, places if by_address else None)
    if places is None:
        return [NetworkQuestion(name, port, protocol, None)]
    own = a.get("own_listener") is True
    return [NetworkQuestion(name, port, protocol, p, by_address, own) for p in places]


def _places(addresses: Json) -> list[Place]:
    if not isinstance(addresses, (list, tuple)) or not 0 < len(addresses) <= ADDRESSES_LIMIT:
        raise Malformed(f"addresses must be a list of 1 to {ADDRESSES_LIMIT} addresses")
    return [place(_text(address)) for address in addresses]


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise Malformed("hosts and addresses must be text")
    return value


def _name_of(value: Json) -> str:
    host = canonical_host(_text(value))
    return "" if host.is_address else host.text


_TARGET = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")


def _split_target(target: str) -> tuple[str, int | None]:
    """`host`, `host:port` or `[address]:port`."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise Malformed("the target is not host:port")
    return found[1] or found[2], int(found[3]) if found[3] else None


def _from_target(target: str, host: Json, port: Json) -> tuple[Json, Json]:
    named, number = _split_target(target)
    return named if host is None else host, number if port is None else port


def _same_target(target: str, name: str, port: int, places: Sequence[Place] | None) -> None:
    """What is recorded must be what is decided."""
    written, number = _split_target(target)
    host = canonical_host(written)
    same = {host.text} == {p.text for p in places} if places is not None else host.text == name
    if not same or number not in (None, port):
        raise Malformed("the target names another host or port than the attributes")


def request_of(action: Action) -> tuple[Request, str]:
    """What an http.request says of the request, and why its path is ambiguous, or "".

    Of a path that is ambiguous the request has "". Raises Malformed.
    """
    a = action.attributes
    if a.get("protocol") not in ("tls", "http"):
        raise Malformed("an http.request says its protocol, tls or http")
    method, raw = a.get("method"), a.get("path")
    path, parts, ambiguous = read_path(raw) if isinstance(raw, str) else (None, (), "")
    headers, body, ws = a.get("headers"), a.get("body"), a.get("ws")
    request = Request(
        method if isinstance(method, str) else None,
        path,
        parts,
        _headers(headers) if headers is not None else None,
        _facts("body", body) if body is not None else None,
        _message(ws) if ws is not None else None,
    )
    return request, ambiguous


def _headers(value: Json) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(v, str) and isinstance(name, str) and name == name.lower()
        for name, v in value.items()
    ):
        raise Malformed("headers must be texts by lower-case name")
    return value


def _facts(key: str, value: Json) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise Malformed(f"{key} must be the facts about it")
    return value


def _message(value: Json) -> Mapping[str, Json]:
    facts = _facts("ws", value)
    if facts.get("direction") not in (OUT, IN):
        raise Malformed("ws says its direction, out or in")
    return facts


def inbound_question(action: Action) -> InboundQuestion:
    """Raises Malformed or InvalidHost."""
    a = action.attributes
    peer, port = a.get("peer"), a.get("port")
    if peer is None and port is None:
        peer, port = _split_target(action.target)
    if type(port) is not int or not 0 < port < 65536:
        raise Malformed("the port must be a whole number from 1 to 65535")
    where = place(_text(peer))
    written, number = _split_target(action.target)
    if place(written).text != where.text or number != port:
        raise Malformed("the target names another address or port than the attributes")
    return InboundQuestion(where, port)


def asked_name(action: Action) -> str:
    """The name of a dns.query. Raises Malformed or InvalidHost."""
    name = canonical_host(action.target)
    if name.is_address:
        raise Malformed(f"{name} is an address, not a name to resolve")
    return name.text


# -- paths -------------------------------------------------------------------------------------


def exec_question(run: Run, action: Action) -> PathQuestion:
    """Raises Malformed."""
    return path_question(_path(action.target), run.home)


def file_questions(run: Run, action: Action) -> list[PathQuestion]:
    """One for each thing that is done: a rename takes one name away and writes another.

    Raises Malformed.
    """
    target = _path(action.target)
    a = action.attributes
    if action.kind is Kind.FILE_UNLINK:
        return [path_question(target, run.home, Access.DELETE)]
    if action.kind is Kind.FILE_RENAME:
        to = a.get("to")
        if not isinstance(to, str):
            raise Malformed("a file.rename says the new name in to")
        return [
            path_question(target, run.home, Access.DELETE),
            path_question(_path(to), run.home, Access.WRITE),
        ]
    access = a.get("access", Access.WRITE.value)
    wanted = [access] if isinstance(access, str) else access
    if not isinstance(wanted, (list, tuple)) or not wanted:
        raise Malformed("access must be read or write, or both")
    if any(not isinstance(w, str) or w not in (Access.READ, Access.WRITE) for w in wanted):
        raise Malformed("access must be read or write, or both")
    return [path_question(target, run.home, Access(w)) for w in wanted]


def _path(path: str) -> str:
    if not path.startswith("/") or "\0" in path or posixpath.normpath(path) != path:
        raise Malformed("the path is not absolute and in its normal form")
    if path.startswith("//"):
        raise Malformed("the path is not absolute and in its normal form")
    return path


# -- calls -------------------------------------------------------------------------------------


def tool_question(action: Action) -> ToolQuestion:
    return ToolQuestion(action.target, action.attributes.get("args"))


def mcp_question(action: Action) -> McpQuestion:
    """Raises Malformed."""
    a = action.attributes
    server, tool = _two(action, "server", "tool")
    method = a.get("method", CALLS_TOOL)
    if not isinstance(method, str) or not 0 < len(method) <= NAME_LIMIT:
        raise Malformed("the method must be a text")
    if not server or bool(tool) is not (method == CALLS_TOOL):
        raise Malformed(f"an mcp.call names a server and, with {CALLS_TOOL} alone, a tool")
    return McpQuestion(server, method, tool, a.get("args"))


def llm_question(action: Action) -> LlmQuestion:
    """Raises Malformed."""
    provider, model = _two(action, "provider", "model")
    if not provider or not model:
        raise Malformed("an llm.request names a provider and a model")
    return LlmQuestion(provider, model)


def _two(action: Action, first: str, second: str) -> tuple[str, str]:
    """The two parts of a target such as provider/model, which may be in attributes as well:
    what is recorded must be what is decided."""
    a = action.attributes
    before, _, after = action.target.partition("/")
    one, two = a.get(first), a.get(second)
    one = before if one is None else one
    two = after if two is None else two
    if not isinstance(one, str) or not isinstance(two, str):
        raise Malformed(f"{first} and {second} must be texts")
    if action.target not in (f"{one}/{two}", f"{one}{two and '/'}{two}"):
        raise Malformed(f"the target names another {first} or {second} than the attributes")
    if len(action.target) > NAME_LIMIT:
        raise Malformed(f"{first} and {second} are longer than {NAME_LIMIT} characters")
    return one, two
