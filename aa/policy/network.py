"""Matchers of connections and of the requests in them, and the questions that they answer.

A connection is matched by host, addresses, port and protocol. Methods, paths, headers,
bodies and WebSocket messages are content: a rule that names some decides requests.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aa.model import Effect
from aa.policy.address import Place, Range
from aa.policy.content import ANY, IN
from aa.policy.pathname import PathPattern
from aa.policy.pattern import HostPattern, Matcher

Json = Any

DEFAULT_PORTS = frozenset((443, 80))
"""Ports of an allow or ask rule that names none. A deny rule that names none is about all."""
DEFAULT_INSPECT_LIMIT = 16 << 20
"""Bytes of a body that a rule must judge; a larger one is denied."""


class Match(enum.IntEnum):
    NO = 0
    PROVISIONAL = 1  # as far as is known; what is not known yet will tell
    YES = 2


class Request(NamedTuple):
    """What is known of an HTTP request. None is what was not told."""

    method: str | None
    path: str | None
    """In its normal form, "" if it is ambiguous."""
    parts: tuple[str, ...]
    """The path's components."""
    headers: Mapping[str, str] | None
    body: Mapping[str, Json] | None
    ws: Mapping[str, Json] | None


class NetworkQuestion(NamedTuple):
    """One connection to one of its addresses, or to none in the step of names.

    With `by_address` the client asked for the address itself; `host` is then the name
    that our resolver gave the run for it, if any.
    """

    host: str
    port: int
    protocol: str  # "" while it is not known
    place: Place | None
    by_address: bool = False
    own: bool = False
    """Whether it goes to a listener of the same run."""


@dataclass(frozen=True, slots=True)
class HeaderPattern:
    """`name` is lower-case; the value must fit as a whole."""

    name: str
    text: str
    test: Matcher

    def matches(self, value: str, effect: Effect) -> bool:
        """A header may be sent several times: then an allow rule needs all its values to fit, and
        any other rule one of them."""
        values = value.split(", ")
        if effect is not Effect.ALLOW:
            return self.test(value) or any(map(self.test, values))
        return self.test(value) and ("," in self.text or all(map(self.test, values)))

    def __str__(self) -> str:
        return f"{self.name} = {self.text!r}"


@dataclass(frozen=True, slots=True)
class BodyMatcher:
    """What the agent sends: a body, or a WebSocket message. Both keys must match if both are there."""

    secrets: tuple[str, ...]
    texts: tuple[str, ...]

    def matches(self, facts: Mapping[str, Json]) -> bool:
        """What the facts do not tell counts as found: only deny and ask rules look at bodies."""
        return _found(self.secrets, facts.get("secrets")) and _found(self.texts, facts.get("texts"))


@dataclass(frozen=True, slots=True)
class WsMatcher:
    """A WebSocket message in one of the directions, with one of the texts."""

    directions: tuple[str, ...]
    texts: tuple[str, ...]

    def matches(self, facts: Mapping[str, Json]) -> bool:
        return facts.get("direction") in self.directions and _found(self.texts, facts.get("texts"))


def _found(wanted: Sequence[str], found: Json) -> bool:
    if not wanted or not isinstance(found, (list, tuple)):
        return True
    return bool(found) if ANY in wanted else any(name in found for name in wanted)


@dataclass(frozen=True, slots=True)
class NetworkMatcher:
    """`ports` and `methods` are None for all of them. `hosts` or `ranges` is not empty."""

    hosts: tuple[HostPattern, ...]
    ranges: tuple[Range, ...]
    ports: frozenset[int] | None
    protocol: str
    """`any`, `web` (TLS and HTTP), `tls`, `http` or `opaque`."""
    effect: Effect
    methods: frozenset[str] | None = None
    paths: tuple[PathPattern, ...] = ()
    headers: tuple[HeaderPattern, ...] = ()
    body: BodyMatcher | None = None
    ws: WsMatcher | None = None
    inspect: bool = False
    """Stated by the rule itself."""
    inspect_limit: int | None = None
    """Bytes."""

    content: bool = field(init=False)
    """Whether it decides requests, and no connection."""
    inspects: bool = field(init=False)
    """Whether what it matches is decrypted. A denial never widens what is."""
    looks: bool = field(init=False)
    """Whether it looks at bodies or messages."""
    _paths: tuple[frozenset[str], tuple[PathPattern, ...]] = field(init=False, compare=False)
    """Those of `paths` without wildcards, and the others."""

    def __post_init__(self) -> None:
        head = bool(self.methods or self.paths or self.headers)
        looks = self.body is not None or self.ws is not None
        inspects = self.effect is not Effect.DENY and (head or self.inspect)
        exact = frozenset("/" + "/".join(p.literal) for p in self.paths if not p.runs)
        object.__setattr__(self, "content", head or looks)
        object.__setattr__(self, "inspects", inspects)
        object.__setattr__(self, "looks", looks)
        object.__setattr__(self, "_paths", (exact, tuple(p for p in self.paths if p.runs)))

    # -- the connection

    def match(self, q: NetworkQuestion) -> Match:
        if self.ports is not None and q.port not in self.ports:
            return Match.NO
        if self.hosts and not (q.host and any(h.matches(q.host) for h in self.hosts)):
            return Match.NO
        return self.match_rest(q)

    def match_rest(self, q: NetworkQuestion) -> Match:
        """The same for a question whose host is known to match."""
        if self.ports is not None and q.port not in self.ports:
            return Match.NO
        certain = True
        if self.ranges:
            if q.place is None:
                if not self.hosts or self.effect is Effect.DENY:
                    return Match.NO
                certain = False
            elif not self._in_range(q.place):
                return Match.NO
        if self.protocol != "any" and self.protocol != q.protocol:
            speaks = self._speaks(q.protocol)
            if speaks is Match.NO:
                return Match.NO
            certain = certain and speaks is Match.YES
        return Match.YES if certain else Match.PROVISIONAL

    def _in_range(self, place: Place) -> bool:
        if any(r.contains(place) for r in self.ranges):
            return True
        # A deny of 10.0.0.0/8 is meant for 64:ff9b::10.0.0.1 too.
        inner = place.inner
        return (
            self.effect is Effect.DENY
            and inner is not None
            and any(r.contains(inner) for r in self.ranges)
        )

    def _speaks(self, protocol: str) -> Match:
        if not protocol:
            return Match.NO if self.effect is Effect.DENY else Match.PROVISIONAL
        if self.protocol == "web":
            return Match.NO if protocol == "opaque" else Match.YES
        return Match.YES if protocol == self.protocol else Match.NO

    # -- the request

    def match_content(self, r: Request) -> Match:
        """Whether the content fits. PROVISIONAL: all that is known does, and the body or a message
        must be looked at."""
        return self.match_facts(r) if self.match_head(r) else Match.NO

    def match_head(self, r: Request) -> bool:
        """Whether method, path and headers fit. What is not known counts against the agent."""
        methods = self.methods
        return (
            (methods is None or r.method in methods or self._other_method(r.method))
            and (not self.paths or self._path(r))
            and (not self.headers or self._headers(r.headers))
        )

    def match_facts(self, r: Request) -> Match:
        """Whether the body, or the message, fits."""
        if self.ws is not None:
            if r.ws is None:
                return Match.PROVISIONAL
            if not self.ws.matches(r.ws):
                return Match.NO
        if self.body is not None:
            sent = r.body
            if r.ws is not None:
                sent = r.ws if r.ws.get("direction") != IN else None
            elif sent is None:
                return Match.PROVISIONAL
            if sent is None or not self.body.matches(sent):
                return Match.NO
        return Match.YES

    def _other_method(self, method: str | None) -> bool:
        """A server may take `get` for GET, so a denial does."""
        assert self.methods is not None
        return self.effect is not Effect.ALLOW and (
            method is None or method.upper() in self.methods
        )

    def _path(self, r: Request) -> bool:
        if not r.path:
            return self.effect is not Effect.ALLOW
        exact, wild = self._paths
        if r.path in exact or any(p.matches(r.parts) for p in wild):
            return True
        if self.effect is Effect.ALLOW or r.parts[-1] or len(r.parts) == 1:
            return False
        # Most servers take /a/ for /a, so what is no permission does.
        return r.path[:-1] in exact or any(p.matches(r.parts[:-1]) for p in wild)

    def _headers(self, headers: Mapping[str, str] | None) -> bool:
        if headers is None:
            return self.effect is not Effect.ALLOW
        for h in self.headers:
            value = headers.get(h.name)
            if value is None or not h.matches(value, self.effect):
                return False
        return True

    # -- in words

    def why(self, q: NetworkQuestion) -> tuple[Match, str]:
        """The answer of `match`, and the words for it."""
        answer = self.match(q)
        if self.ports is not None and q.port not in self.ports:
            return answer, f"its ports are {listed(sorted(self.ports))}, not {q.port}"
        if self.hosts and not q.host:
            return answer, "it names hosts, and this connection is to an address without a name"
        if self.hosts and not any(h.matches(q.host) for h in self.hosts):
            return answer, f"none of its hosts ({listed(self.hosts)}) matches {q.host}"
        if self.ranges and q.place is None and not self.hosts:
            return answer, "it is about addresses, and this step knows the name alone"
        if self.ranges and q.place is None and answer is Match.NO:
            return answer, "it needs the addresses, and this step knows the name alone"
        if self.ranges and q.place is not None and not self._in_range(q.place):
            ranges = listed(r.text for r in self.ranges)
            return answer, f"{q.place.text} is in none of its cidrs ({ranges})"
        if answer is Match.NO:
            return answer, _protocol_words(self.protocol, q.protocol)
        where = f"{q.host or (q.place.text if q.place else '')} port {q.port}"
        if answer is Match.PROVISIONAL:
            return answer, f"{where} fits so far; its addresses or its protocol will tell"
        return answer, f"{where} fits"

    def why_content(self, r: Request) -> tuple[Match, str]:
        """The answer of `match_content`, and the words for it."""
        answer = self.match_content(r)
        methods = self.methods
        if methods is not None and not (r.method in methods or self._other_method(r.method)):
            return answer, f"its methods are {listed(sorted(methods))}, not {r.method or '-'}"
        if self.paths and not self._path(r):
            return answer, f"none of its paths ({listed(self.paths)}) matches {r.path or '-'}"
        if self.headers and not self._headers(r.headers):
            return answer, f"the headers do not fulfil {listed(self.headers)}"
        if answer is Match.PROVISIONAL:
            what = "WebSocket messages" if self.ws is not None else "the body"
            return answer, f"it judges {what}, which the proxy looks at before it lets them go on"
        if (
            answer is Match.NO
            and self.ws is not None
            and (r.ws is None or not self.ws.matches(r.ws))
        ):
            return answer, "it is about other WebSocket messages"
        if answer is Match.NO:
            return answer, "what it looks for is not in the body or message"
        return answer, "the request fits"


def _protocol_words(wanted: str, spoken: str) -> str:
    if not spoken:
        return "it depends on the protocol, which is not known yet"
    if wanted == "web":
        return (
            "it is for TLS and HTTP, and this connection speaks neither: "
            'for ssh and the like a rule needs protocol = "opaque"'
        )
    return f"it is for {wanted}, and this connection speaks {spoken}"


def listed(values: Any, limit: int = 6) -> str:
    texts = [str(v) for v in values]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
