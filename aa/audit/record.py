"""What one audit record is: a flat mapping, the same for the file and for the journal."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json import encoder
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
_LEVELS = {"gap": "error", "alert": "error", "lifecycle": "notice"}


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


_second: tuple[int, str] = (0, "1970-01-01T00:00:00")
"""The last second that was written, and its text."""


def timestamp(nanoseconds: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    global _second
    microseconds = nanoseconds // 1000
    second = microseconds // 1_000_000
    if _second[0] != second:
        _second = second, clock.strftime("%Y-%m-%dT%H:%M:%S", clock.gmtime(second))
    return f"{_second[1]}.{microseconds % 1_000_000:06d}Z"


def of_decision(
    subject: Subject, layer: Layer, action: Action, decision: Decision, time: int
) -> Record:
    """The record of a decision that the gateway made."""
    attributes = action.attributes
    if decision.approval:
        attributes = {**attributes, "approval": decision.approval}
    # StrEnum's `value` is a call; `_value_` is the attribute behind it.
    return _record(
        RecordType.DECISION,
        subject,
        time,
        layer._value_,
        action.kind._value_,
        action.target,
        decision.effect._value_,
        decision.rule,
        decision.reason,
        decision.policy,
        decision.mode._value_,
        decision.would._value_ if decision.would else "",
        attributes,
    )


def of_report(subject: Subject, report: Report, policy: str, said: Decision | None) -> Record:
    """The record of what a component saw or refused, with what the policy says of it."""
    would = (said.would or said.effect) if said else None
    against = said if said and would is not Effect.ALLOW else None
    return _record(
        report.type,
        subject,
        report.time,
        report.layer._value_,
        report.kind._value_,
        report.target,
        report.effect._value_ if report.effect else "",
        report.rule or (said.rule if said else ""),
        report.reason or (against.reason if against else ""),
        policy,
        said.mode._value_ if said else "",
        would._value_ if would else "",
        report.attributes,
        report.count,
    )


def _record(
    type_: RecordType,
    subject: Subject,
    time: int,
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
        "type": type_._value_,
        "layer": layer,
        "kind": kind,
        "target": target if len(target) <= MAX_TEXT else _cut(target),
        "decision": decision,
        "rule": rule if len(rule) <= MAX_TEXT else _cut(rule),
        "reason": reason if len(reason) <= MAX_TEXT else _cut(reason),
        "policy": policy,
        "mode": mode,
        "would": would,
        "agent": subject.agent,
        "run": subject.run,
        "user": subject.user,
        "uid": subject.uid,
        "count": count,
        "attributes": attributes,  # the log bounds them
    }


def _cut(text: str) -> str:
    return text[: MAX_TEXT - 1] + "…"


_quoted: Callable[[str], str] = encoder.encode_basestring_ascii
# Made once: json.dumps makes one for each call.
_chunks = encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, json.JSONEncoder().default, _quoted, None, ":", ",", False, False, True
)


def bounded_attributes(record: Record) -> str:
    """The attributes of a record as JSON. Larger ones than may be are replaced in the record."""
    attributes = record["attributes"]
    if not attributes:
        record["attributes"] = {}
        return "{}"
    text = "".join(_chunks(attributes, 0))
    if len(text) <= MAX_ATTRIBUTES:
        return text
    record["attributes"] = {"omitted": f"{len(text)} characters"}
    return "".join(_chunks(record["attributes"], 0))


def line(record: Record, attributes: str) -> bytes:
    """The record as one line of JSON; `attributes` are its attributes as JSON."""
    r, q = record, _quoted
    return (
        f'{{"seq":{r["seq"]},"time":"{r["time"]}","type":"{r["type"]}","layer":{q(r["layer"])},'
        f'"kind":{q(r["kind"])},"target":{q(r["target"])},"decision":{q(r["decision"])},'
        f'"rule":{q(r["rule"])},"reason":{q(r["reason"])},"policy":{q(r["policy"])},'
        f'"mode":{q(r["mode"])},"would":{q(r["would"])},"agent":{q(r["agent"])},'
        f'"run":{q(r["run"])},"user":{q(r["user"])},"uid":{r["uid"]},"count":{r["count"]},'
        f'"attributes":{attributes}}}\n'
    ).encode("ascii")


def priority(record: Record) -> int:
    """The syslog level of a record."""
    if record["decision"] == "deny":
        return _PRIORITY["error" if record["type"] in ("gap", "alert") else "warning"]
    return _PRIORITY[_LEVELS.get(record["type"], "info")]


def sentence(record: Record) -> str:
    """One line for people; control characters in what an agent chose are made visible."""
    agent, run, would = record["agent"], record["run"], record["would"]
    who = f"{agent} [{run}]: " if agent and run else f"[{run}]: " if run else agent and f"{agent}: "
    verdict = record["decision"] or record["type"]
    if would and would != (record["decision"] or Effect.ALLOW.value):
        verdict += f" (enforce would {would})"
    times = f" ({record['count']} times)" if record["count"] > 1 else ""
    rule = f" by {record['rule']}" if record["rule"] else ""
    reason = f": {record['reason']}" if record["reason"] else ""
    return printable(f"{who}{verdict} {record['kind']} {record['target']}{times}{rule}{reason}")


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
