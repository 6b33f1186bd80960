"""A log as the gateway would have written it: what a policy answered to a run, as records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from aa.audit.record import Record, Subject, bounded_attributes, line, of_decision, of_report
from aa.model import Action, Kind, Layer, RecordType, Report, Run
from aa.policy import Policy

RUN = Run(
    "k3v9x2mq",
    "codex",
    "dev",
    1000,
    "/home/dev",
    frozenset((Layer.PROXY, Layer.KERNEL)),
    ("team:a",),
    argv=("codex", "-p"),
    directory="/home/dev/work",
)
MOMENT = 1_700_000_000_000_000_000


def started(run: Run = RUN) -> Record:
    """The record of a run's beginning, as `Gateway.await_ready` writes it."""
    told = Report(
        RecordType.LIFECYCLE,
        Layer.GATEWAY,
        Kind.RUN,
        run.agent,
        MOMENT,
        run.id,
        attributes={
            "argv": list(run.argv),
            "directory": run.directory,
            "home": run.home,
            "tags": list(run.tags),
            "layers": sorted(layer.value for layer in run.layers),
            "caller_uid": 0,
        },
    )
    return of_report(Subject.of(run), told, "rev", None)


def decided(policy: Policy, actions: Iterable[Action], run: Run = RUN) -> list[Record]:
    """A record of each decision of a policy."""
    now = MOMENT / 1e9
    return [
        of_decision(Subject.of(run), Layer.PROXY, a, policy.decide(run, a, now=now), MOMENT)
        for a in actions
    ]


def seen(kind: Kind, target: str, run: Run = RUN, **attributes: Any) -> Record:
    """What the kernel layer saw."""
    report = Report(
        RecordType.OBSERVED, Layer.KERNEL, kind, target, MOMENT, run.id, attributes=attributes
    )
    return of_report(Subject.of(run), report, "rev", None)


def written(records: Iterable[Record]) -> list[Record]:
    """The records as they are in the file."""
    numbered = [{**r, "seq": n} for n, r in enumerate(records, 1)]
    return [json.loads(line(r, bounded_attributes(r))) for r in numbered]


def connect(target: str, protocol: str = "tls", **attributes: Any) -> Action:
    host, _, port = target.rpartition(":")
    attributes = {"port": int(port), "protocol": protocol, **attributes}
    if host and not host[0].isdigit():
        attributes = {"host": host, "addresses": ["93.184.216.34"], **attributes}
    else:
        attributes = {"addresses": [host], **attributes}
    return Action(Kind.NET_CONNECT, target, attributes)


def dns(name: str) -> Action:
    return Action(Kind.DNS_QUERY, name, {"qtype": "A"})


def tool(name: str, **args: Any) -> Action:
    return Action(Kind.TOOL_CALL, name, {"args": args})
