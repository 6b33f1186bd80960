"""What an allow is bound to: inspection of a connection, a look at a body, a secret put into a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aa.model import Effect, Obligation
from aa.policy.content import IN, OUT
from aa.policy.network import DEFAULT_INSPECT_LIMIT, NetworkQuestion, Request
from aa.policy.rules import Rule
from aa.policy.secret import Secret

Json = Any

INSPECT = "inspect"


def of_connection(
    found: Iterable[tuple[NetworkQuestion, Sequence[Rule]]],
    *,
    binding: int,
    files: int,
    models: bool,
) -> Obligation:
    """What the worker that inspects a connection must know: the headers that rules mention (it
    tells no others), and whether it will have to look at bodies and messages.

    `found` are the rules about its host or address, whatever time it is: a connection may last.
    Of the files (as bits) those that bind hold bodies up; the others only want to know headers.
    """
    headers: set[str] = set()
    body = ws = False
    limits: list[int] = []
    for q, rules in found:
        for rule in rules:
            n = rule.network
            if not rule.bit & files or n is None or n.protocol == "opaque":
                continue
            if n.ports is not None and q.port not in n.ports:
                continue
            headers.update(h.name for h in n.headers)
            if not rule.bit & binding:
                continue
            body = body or n.body is not None
            ws = ws or n.looks
            if n.inspect_limit is not None:
                limits.append(n.inspect_limit)
    return Obligation(
        INSPECT,
        {
            "headers": sorted(headers),
            "body": body,
            "ws": ws,
            "limit": min(limits, default=DEFAULT_INSPECT_LIMIT),
            "llm": models,
        },
    )


def of_request(
    q: NetworkQuestion, request: Request, judged: Sequence[Rule], secrets: Sequence[Secret]
) -> tuple[Obligation, ...]:
    """The look at body and messages that rules want, and the secrets for this host."""
    found: list[Obligation] = []
    if judged and request.ws is None:
        wanted = _wanted(judged, body=request.body is None)
        if wanted:
            found.append(Obligation(INSPECT, wanted))
    if request.ws is None and q.host and not q.by_address:
        found += [s.obligation for s in secrets if s.is_for(q.host, q.port, q.protocol)]
    return tuple(found)


def _wanted(judged: Sequence[Rule], *, body: bool) -> dict[str, Json]:
    secrets: dict[str, None] = {}
    texts: dict[str, None] = {}
    messages: dict[str, dict[str, None]] = {OUT: {}, IN: {}}
    limits: list[int] = []
    for rule in judged:
        n = rule.network
        assert n is not None and rule.effect is not Effect.ALLOW
        if n.inspect_limit is not None:
            limits.append(n.inspect_limit)
        if n.body is not None:
            secrets.update(dict.fromkeys(n.body.secrets))
            texts.update(dict.fromkeys(n.body.texts))
            messages[OUT].update(dict.fromkeys(n.body.texts))
        if n.ws is not None:
            for direction in n.ws.directions:
                # A rule about every message of a direction has no text; each must be decided.
                messages[direction].update(dict.fromkeys(n.ws.texts or ("*",)))
    wanted: dict[str, Json] = {}
    if body and (secrets or texts):
        wanted["body"] = {"secrets": list(secrets), "texts": list(texts)}
        wanted["limit"] = min(limits, default=DEFAULT_INSPECT_LIMIT)
    if secrets or any(messages.values()):
        wanted["ws"] = {
            OUT: list(messages[OUT]),
            IN: list(messages[IN]),
            "secrets": list(secrets),
        }
    return wanted
