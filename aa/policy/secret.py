"""Secrets that the proxy puts into requests in place of what the agent holds. Names and places only:
the secret itself is a credential of the proxy's unit, and never here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aa.model import Mode, Obligation
from aa.policy.pattern import Depth, HostPattern, InvalidPattern, host_pattern
from aa.tomlfile import Document, Problem

Json = Any

SECRET_PORTS = frozenset((443,))
"""Where a secret goes that names no ports."""
FORBIDDEN_HEADERS = frozenset(
    "host connection content-length transfer-encoding te trailer upgrade keep-alive".split()
)
"""They say how a request is sent, and to whom."""


@dataclass(frozen=True, slots=True)
class Secret:
    """One [[secret]]. It goes to its hosts and ports alone, and over TLS alone."""

    ref: str  # POLICY-ID/SECRET-ID
    id: str
    credential: str
    hosts: tuple[HostPattern, ...]
    ports: frozenset[int]
    header: str
    format: str
    placeholder: str
    mode: Mode

    def is_for(self, host: str, port: int, protocol: str) -> bool:
        return protocol == "tls" and port in self.ports and any(h.matches(host) for h in self.hosts)

    @property
    def obligation(self) -> Obligation:
        return Obligation(
            "inject",
            {
                "id": self.ref,
                "source": {"credential": self.credential},
                "header": self.header,
                "format": self.format,
                "placeholder": self.placeholder,
            },
        )

    def as_json(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "credential": self.credential,
            "hosts": [str(h) for h in self.hosts],
            "ports": sorted(self.ports),
            "header": self.header,
            "format": self.format,
            "placeholder": self.placeholder,
        }


def secrets_of(
    document: Document, policy: str, mode: Mode, problems: list[Problem]
) -> Iterator[Secret]:
    """The secrets of a file that fits the schema; what is wrong all the same goes to `problems`."""
    seen: set[str] = set()
    held: set[str] = set()
    for index, written in enumerate(document.data.get("secret", ())):
        inject = written["inject"]

        def tell(path: tuple[str | int, ...], message: str, fix: str, at: int = index) -> None:
            problems.append(document.problem(("secret", at, *path), message, fix))

        if written["id"] in seen:
            message = f"{written['id']!r} is the id of a secret before it too"
            tell(("id",), message, "give it another")
        if written["placeholder"] in held:
            tell(("placeholder",), "is that of a secret before it too", "give it another")
        seen.add(written["id"])
        held.add(written["placeholder"])
        if inject["header"].lower() in FORBIDDEN_HEADERS:
            fix = "write one such as Authorization"
            tell(("inject", "header"), f"{inject['header']!r} is about the connection", fix)
        if inject.get("format", "{}").count("{}") != 1:
            tell(("inject", "format"), "must have {} once, for the secret", 'write "Bearer {}"')
        hosts = []
        for n, text in enumerate(inject["hosts"]):
            pattern = _host(text, lambda *told, at=n: tell(("inject", "hosts", at), *told))
            if pattern is not None:
                hosts.append(pattern)
        yield Secret(
            ref=f"{policy}/{written['id']}",
            id=written["id"],
            credential=written["source"]["credential"],
            hosts=tuple(hosts),
            ports=frozenset(inject.get("ports", SECRET_PORTS)),
            header=inject["header"],
            format=inject.get("format", "{}"),
            placeholder=written["placeholder"],
            mode=mode,
        )


def _host(text: str, tell: Any) -> HostPattern | None:
    try:
        pattern = host_pattern(text)
    except InvalidPattern as e:
        tell(str(e), e.fix)
        return None
    if pattern.wide or (pattern.depth is Depth.ANY and not pattern.suffix):
        tell(f"{text!r} would send the secret to anybody", "name the host")
    return pattern
