"""What is told of plaintext: the reports of requests and of what is not measured. No I/O."""

from __future__ import annotations

import re

from aa.ebpf.tls.sessions import Seen
from aa.model import Json, Kind, Layer, RecordType, Report
from aa.policy.host import InvalidHost, canonical_host

SOURCE = "tls-probe"
UNMEASURED = "unmeasured"

_DEFAULT_PORTS = {"https": 443, "http": 80}
_WITH_PORT = re.compile(r"(\[[^\]]+\]|[^:]*):(\d{1,5})")


def request_report(seen: Seen, *, run: str, library: str, inferred: str, boot: int) -> Report:
    """The report of a request.

    `inferred` is the peer that the run's connections suggest, `boot` the time of the
    boot in nanoseconds since the epoch.
    """
    request, who = seen.request, seen.who
    host, port = _host(request.host)
    target_host = f"[{host}]" if ":" in host else host
    if port and port != _DEFAULT_PORTS[request.scheme]:
        target_host += f":{port}"
    attributes: dict[str, Json] = {
        "source": SOURCE,
        "pid": who.pid,
        "uid": who.uid,
        "comm": who.comm,
        "library": library,
        "peer": who.peer or inferred,
        "peer_exact": bool(who.peer),
        "method": request.method,
        "path": request.path,
        "host": host,
        "http": request.http,
        "bytes_out": seen.sent,
        "bytes_in": seen.received,
    }
    if seen.continued:
        attributes["continued"] = True
    authority = target_host or who.peer or inferred
    return Report(
        type=RecordType.OBSERVED,
        layer=Layer.KERNEL,
        kind=Kind.HTTP_REQUEST,
        target=f"{request.scheme}://{authority}{request.path}",
        time=seen.time + boot,
        run=run,
        attributes=attributes,
    )


def unmeasured_report(
    reason: str, count: int, *, run: str, time: int, about: dict[str, Json]
) -> Report:
    """The report of `count` equal things that were not measured. `time` since the epoch."""
    return Report(
        type=RecordType.OBSERVED,
        layer=Layer.KERNEL,
        kind=Kind.HTTP_REQUEST,
        target=UNMEASURED,
        time=time,
        run=run,
        count=count,
        attributes={"source": SOURCE, "unmeasured": reason, "count": count} | about,
    )


def _host(authority: str) -> tuple[str, int]:
    """The canonical host and the port of an authority; the text as it is where it is no host."""
    found = _WITH_PORT.fullmatch(authority)
    name, port = (found[1], int(found[2])) if found else (authority, 0)
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    try:
        return canonical_host(name).text if name else "", port
    except InvalidHost:
        return name, port
