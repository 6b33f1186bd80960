"""What one audit record is: a flat mapping, the same for the file and for the journal."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aa.model import Action, Decision, Effect, Layer, RecordType, Report, Run

Json = Any
Record = dict[str, Json]

MAX_TEXT = 4096
"""Characters of one text field; longer ones are cut and end in an ellipsis."""
MAX_ATTRIBUTES = 16384
"""Characters of all attributes as JSON; larger ones are replaced by their size."""

MESSAGE_IDS: Mapping[RecordType, str] = {
    RecordType.DECISION: "8a5f0c1b6d7e4f0a9b1c2d3e4f506172",
    RecordType.REFUSAL: "1c9e2f7a4b3d4c58a6e0f1d2c3b4a596",
    RecordType.OBSERVED: "5d0b7e9c2a1f4e6db8c3a4f5e6071829",
    RecordType.LIFECYCLE: "c47a1e5b9d2043f8a7b6c5d4e3f20110",
    RecordType.GAP: "e21d3c4b5a694788b9a0c1d2e3f40516",
    RecordType.ALERT: "f7b8a9c0d1e24f3a8b5c6d7e8f901a2b",
}
"""The journal's MESSAGE_ID of each type; units/agent-assembly.catalog explains them."""

_PRIORITY = {"error": 3, "warning": 4, "notice": 5, "info": 6}


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a record is about."""

    run: str
    agent: str = ""
    user: str = ""
    uid: int = -1

    @classmethod
    def of(cls, run: Run) -> Subject:
        return cls(run.id, run.agent, run.user, run.uid)


NOBODY = Subject("")
"""The subject of records about the guard itself."""


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    moment = datetime.datetime.fromtimestamp(nanoseconds // 1000 / 1e6, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def of_decision(
    subject: Subject, layer: Layer, action: Action, decision: Decision, time: int
) -> Record:
    """The record of a decision that the gateway made."""
    return _record(
        RecordType.DECISION,
        subject,
        time,
        layer=layer.value,
        kind=action.kind.value,
        target=action.target,
        decision=decision.effect.value,
        rule=decision.rule,
        reason=decision.reason,
        policy=decision.policy,
        mode=decision.mode.value,
        would=decision.would.value if decision.would else "",
        attributes={**action.attributes, "approval": decision.approval}
        if decision.approval
        else action.attributes,
    )


def of_report(subject: Subject, report: Report, policy: str, said: Decision | None) -> Record:
    """The record of what a component saw or refused, with what the policy says of it."""
    would = (said.would or said.effect) if said else None
    against = said if said and would is not Effect.ALLOW else None
    return _record(
        report.type,
        subject,
        report.time,
        layer=report.layer.value,
        kind=report.kind.value,
        target=report.target,
        decision=report.effect.value if report.effect else "",
        rule=report.rule or (said.rule if said else ""),
        reason=report.reason or (against.reason if against else ""),
        policy=policy,
        mode=said.mode.value if said else "",
        would=would.value if would else "",
        attributes=report.attributes,
        count=report.count,
    )


def _record(
    type_: RecordType,
    subject: Subject,
    time: int,
    *,
    layer: str,
    kind: str,
    target: str,
    decision: str,
    rule: str,
    reason: str,
    policy: str,
    mode: str,
    would: str,
    attributes: Mapping[str, Json],
    count: int = 1,
) -> Record:
    return {
        "seq": 0,  # the log numbers it
        "time": timestamp(time),
        "type": type_.value,
        "layer": layer,
        "kind": kind,
        "target": _cut(target),
        "decision": decision,
        "rule": _cut(rule),
        "reason": _cut(reason),
        "policy": policy,
        "mode": mode,
        "would": would,
        "agent": subject.agent,
        "run": subject.run,
        "user": subject.user,
        "uid": subject.uid,
        "count": count,
        "attributes": _bounded(attributes),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _bounded(attributes: Mapping[str, Json]) -> dict[str, Json]:
    if not attributes:
        return {}
    size = len(json.dumps(attributes))
    return dict(attributes) if size <= MAX_ATTRIBUTES else {"omitted": f"{size} characters"}


def priority(record: Record) -> int:
    """The syslog level of a record."""
    if record["type"] in ("gap", "alert"):
        return _PRIORITY["error"]
    if record["decision"] == Effect.DENY.value:
        return _PRIORITY["warning"]
    return _PRIORITY["notice" if record["type"] == "lifecycle" else "info"]


def sentence(record: Record) -> str:
    """One line for people; control characters in what an agent chose are made visible."""
    who = " ".join(x for x in (record["agent"], record["run"] and f"[{record['run']}]") if x)
    verdict = record["decision"] or record["type"]
    if record["would"] and record["would"] != (record["decision"] or Effect.ALLOW.value):
        verdict += f" (enforce would {record['would']})"
    times = f" ({record['count']} times)" if record["count"] > 1 else ""
    rule = f" by {record['rule']}" if record["rule"] else ""
    reason = f": {record['reason']}" if record["reason"] else ""
    line = f"{who + ': ' if who else ''}{verdict} {record['kind']} {record['target']}{times}{rule}{reason}"
    return printable(line)


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
