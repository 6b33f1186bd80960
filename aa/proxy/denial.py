"""The bytes that tell a client why it was refused: a TLS alert or a readable answer. No I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass

from aa.model import Decision, Kind

ALERT, TLS12, FATAL = 0x15, b"\x03\x03", 2
ACCESS_DENIED = 49
INTERNAL_ERROR = 80

REASON_LIMIT = 2000
"""Characters of a reason that go to the client."""

PROXY_NAME = "aa-proxy"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection does not go on, for the client and for the record.

    `error` is a proxy error type of RFC 9209; `status` 403 when it was decided,
    502 or 504 when the upstream failed.
    """

    decision: Decision
    kind: str
    target: str
    run: str = ""
    status: int = 403
    error: str = "http_request_denied"

    @property
    def explain(self) -> str:
        """The command that explains the decision to an operator."""
        run = f" --run {self.run}" if self.run and "/" not in self.run else ""
        return f"aasm policy explain {self.kind} {self.target}{run}"


_PHRASES = {400: "Bad Request", 403: "Forbidden", 502: "Bad Gateway", 504: "Gateway Timeout"}


def tls_alert(refusal: Refusal) -> bytes:
    """A fatal alert, in the clear, in place of a ServerHello."""
    description = ACCESS_DENIED if refusal.status < 500 else INTERNAL_ERROR
    return bytes((ALERT, *TLS12, 0, 2, FATAL, description))


Fields = tuple[tuple[bytes, bytes], ...]


def http_fields(refusal: Refusal, *, accept: bytes = b"") -> tuple[Fields, bytes]:
    """Headers and body of the answer: JSON for a client that asks for it, text otherwise."""
    as_json = _wants_json(accept)
    body = (_json(refusal) if as_json else _text(refusal)).encode()
    kind = "application/json" if as_json else "text/plain; charset=utf-8"
    fields = (
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Proxy-Status", f"{PROXY_NAME}; error={refusal.error}"),
        ("Cache-Control", "no-store"),
    )
    return tuple((n.encode("ascii"), v.encode("ascii")) for n, v in fields), body


def http_answer(refusal: Refusal, *, accept: bytes = b"", head_only: bool = False) -> bytes:
    """A whole HTTP/1.1 response, after which the connection ends."""
    fields, body = http_fields(refusal, accept=accept)
    lines = [f"HTTP/1.1 {refusal.status} {_PHRASES[refusal.status]}".encode("ascii")]
    lines += [n + b": " + v for n, v in (*fields, (b"Connection", b"close"))]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if head_only else body)


def _wants_json(accept: bytes) -> bool:
    kinds = [part.split(b";")[0].strip().lower() for part in accept.split(b",")]
    return b"application/json" in kinds and b"text/html" not in kinds


def _reason(refusal: Refusal) -> str:
    return refusal.decision.reason[:REASON_LIMIT]


def _json(refusal: Refusal) -> str:
    decision = refusal.decision
    told = {
        "decision": "deny" if refusal.status < 500 else "failed",
        "kind": refusal.kind,
        "target": refusal.target,
        "reason": _reason(refusal),
        "rule": decision.rule,
        "policy": decision.policy,
        "run": refusal.run,
        "why": "aasm why",
        "explain": refusal.explain,
    }
    return json.dumps(told, indent=1) + "\n"


def _text(refusal: Refusal) -> str:
    decision = refusal.decision
    what = "request" if refusal.kind == Kind.HTTP_REQUEST else "connection"
    if refusal.status < 500:
        said = f"Agent Assembly denied this {what}"
    else:
        said = f"Agent Assembly allowed this {what}, but it failed"
    rows = [
        ("what", f"{refusal.kind} {refusal.target}"),
        ("reason", _reason(refusal)),
        ("rule", decision.rule),
        ("policy", decision.policy),
        ("run", refusal.run),
    ]
    lines = [f"  {name + ':':8}{value}" for name, value in rows if value]
    hint = ""
    if refusal.status < 500:
        hint = (
            f"\nIn this run, `aasm why` lists what was refused and what to do.\n"
            f"An operator sees every rule considered with\n  {refusal.explain}\n"
        )
    return f"{said}.\n\n" + "\n".join(lines) + "\n" + hint
