"""What a worker is told of one connection: for whom, where to, and what of it may be looked at. No I/O.

The front sends it ahead over the channel; the connection that follows shows the token, once and
soon, or is nobody's.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aa.model import MalformedValue, Obligation
from aa.proxy.dial import Address, address_of

INSPECT = "inspect"
INSPECT_LIMIT = 16 << 20
"""Bytes of a body that is held back to be judged, where the policy does not say."""
MAX_INSPECT_LIMIT = 1 << 30
HEADER_NAMES_LIMIT = 256
TOKEN_BYTES = 16
TOKEN_SECONDS = 5.0
"""How long a token waits for its connection."""
SESSIONS_WAITING = 4096
"""Tokens that wait at a time; a front that sends more has gone wrong."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the policy wants to know of the requests of a connection: the obligation `inspect`."""

    headers: tuple[str, ...] = ()
    """Names in lower case. No other header leaves the worker."""
    body: bool = False
    ws: bool = False
    limit: int = INSPECT_LIMIT
    llm: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "headers": list(self.headers),
            "body": self.body,
            "ws": self.ws,
            "limit": self.limit,
            "llm": self.llm,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Wanted:
        """Raises MalformedValue for what it does not know."""
        unknown = sorted(set(value) - {"headers", "body", "ws", "limit", "llm"})
        if unknown:
            raise MalformedValue(f"inspect: {', '.join(unknown)} is not known here")
        headers = value.get("headers", [])
        if not isinstance(headers, list) or not all(_is_header(h) for h in headers):
            raise MalformedValue("inspect: headers must be names in lower case")
        if len(headers) > HEADER_NAMES_LIMIT:
            raise MalformedValue(f"inspect: more than {HEADER_NAMES_LIMIT} headers")
        limit = value.get("limit", INSPECT_LIMIT)
        if type(limit) is not int or not 0 < limit <= MAX_INSPECT_LIMIT:
            raise MalformedValue("inspect: limit must be a number of bytes")
        for flag in ("body", "ws", "llm"):
            if not isinstance(value.get(flag, False), bool):
                raise MalformedValue(f"inspect: {flag} must be true or false")
        return cls(
            headers=tuple(headers),
            body=value.get("body", False),
            ws=value.get("ws", False),
            limit=limit,
            llm=value.get("llm", False),
        )


def _is_header(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and name.isascii() and name == name.lower()


def inspection(obligations: Sequence[Obligation]) -> Wanted | None:
    """What a connection's obligations ask for, None without any. Raises MalformedValue for an
    obligation that cannot be met at a connection."""
    if not obligations:
        return None
    others = sorted({o.name for o in obligations} - {INSPECT})
    if others:
        raise MalformedValue(f"this proxy cannot meet {', '.join(others)}")
    if len(obligations) != 1:
        raise MalformedValue("inspection is asked for twice")
    return Wanted.from_json(obligations[0].parameters)


@dataclass(frozen=True, slots=True)
class Session:
    """One connection that was decided and is to be inspected."""

    id: str
    secret: str = field(repr=False)
    run: str
    uid: int
    host: str
    """The one canonical name; empty where the connection is for an address alone."""
    port: int
    addresses: tuple[Address, ...]
    """All of them were decided; no other is dialled."""
    protocol: str  # "tls" or "http"
    wanted: Wanted
    scope: int = 0
    single: bool = False
    """One request and no more: it came to the explicit proxy with a whole URL."""

    @property
    def name(self) -> str:
        """Whom the certificates must name."""
        return self.host or str(self.addresses[0])

    @property
    def target(self) -> str:
        name = self.name
        return f"[{name}]:{self.port}" if ":" in name else f"{name}:{self.port}"

    @property
    def authority(self) -> str:
        """The name as a Host header has it."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        usual = 443 if self.protocol == "tls" else 80
        return name if self.port == usual else f"{name}:{self.port}"

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "secret": self.secret,
            "run": self.run,
            "uid": self.uid,
            "host": self.host,
            "port": self.port,
            "addresses": [str(a) for a in self.addresses],
            "protocol": self.protocol,
            "wanted": self.wanted.as_json(),
            "scope": self.scope,
            "single": self.single,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Session:
        """Raises KeyError, TypeError or ValueError: the two halves are of one version."""
        given = dict(value)
        given["addresses"] = tuple(address_of(a) for a in given["addresses"])
        given["wanted"] = Wanted.from_json(given["wanted"])
        session = cls(**given)
        if not session.addresses or session.protocol not in ("tls", "http"):
            raise ValueError("a session without an address or a protocol")
        return session


def new_token() -> tuple[str, str]:
    """A session's id and its secret."""
    return secrets.token_hex(8), secrets.token_hex(TOKEN_BYTES)


class Waiting:
    """The sessions whose connection has not come yet. Each is taken once, in time, with its secret."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[str, tuple[float, Session]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, session: Session) -> None:
        self._forget_late()
        if len(self._waiting) >= SESSIONS_WAITING:
            raise ValueError(f"{SESSIONS_WAITING} connections are announced and do not come")
        self._waiting[session.id] = (self._clock() + TOKEN_SECONDS, session)

    def take(self, id_: str, secret: str) -> Session | None:
        """The session of a token, which is then worth nothing any more. A wrong secret uses it up."""
        until, session = self._waiting.pop(id_, (0.0, None))
        if session is None or self._clock() >= until:
            return None
        return session if hmac.compare_digest(session.secret.encode(), secret.encode()) else None

    def _forget_late(self) -> None:
        now = self._clock()
        while self._waiting:
            first = next(iter(self._waiting))
            if self._waiting[first][0] > now:
                return
            del self._waiting[first]


@dataclass(frozen=True, slots=True)
class End:
    """How an inspected connection ended, as its worker tells the front."""

    id: str
    reason: str = "closed"
    requests: int = 0
    upstream: str = ""
    clean: bool = True
    """Whether the client may take the end for a proper one."""

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "reason": self.reason,
            "requests": self.requests,
            "upstream": self.upstream,
            "clean": self.clean,
        }
