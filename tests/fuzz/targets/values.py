"""Values that cross process boundaries: one of the model's types, or `MalformedValue`, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from aa.audit import record as records
from aa.audit.journal import _FIELDS, datagram
from aa.audit.record import NOBODY
from aa.model import (
    Action,
    Decision,
    Effect,
    Kind,
    Layer,
    MalformedValue,
    Mode,
    Obligation,
    RecordType,
    Report,
    Run,
    deny,
)
from aa.varlink.codec import ProtocolError, decode, encode
from tests.fuzz.mutate import json_value

TYPES: tuple[Any, ...] = (Action, Obligation, Decision, Run, Report)
FIELDS = {*_FIELDS, "MESSAGE", "PRIORITY", "MESSAGE_ID", "SYSLOG_IDENTIFIER", "AA_ATTRIBUTES"}

mutate = json_value


def seeds() -> Iterator[bytes]:
    action = Action(Kind.TOOL_CALL, "search", {"args": {"q": ["x", 1.5, None, True]}})
    obligation = Obligation("inspect", {"headers": ["x"], "limit": 5})
    for number, value in (
        (0, action),
        (1, obligation),
        (2, Decision(Effect.ALLOW, "why", "a/b", "rev", Mode.OBSERVE, Effect.ASK, (obligation,))),
        (3, Run("r", "agent", "dev", 1000, "/home/dev", frozenset(Layer), ("t",), argv=("x",))),
        (4, Report(RecordType.GAP, Layer.KERNEL, Kind.EXEC, "/bin/x", 10**18, count=3)),
        (4, Report(RecordType.OBSERVED, Layer.PROXY, Kind.RUN, "x\ny", 10**18, "r", Effect.DENY)),
    ):
        yield json.dumps([number, value.as_json()]).encode()


def one(data: bytes) -> None:
    try:
        message = decode(b'{"is":' + data + b"}")
    except ProtocolError:
        return
    wanted = message["is"]
    if not isinstance(wanted, list) or len(wanted) != 2 or type(wanted[0]) is not int:
        return
    kind = TYPES[wanted[0] % len(TYPES)]
    try:
        value = kind.from_json(wanted[1])
    except MalformedValue:
        return
    assert kind.from_json(decode(encode(value.as_json())[:-1])) == value
    if isinstance(value, Report):
        _record(records.of_report(NOBODY, value, "rev", None), value.target)
    if isinstance(value, Action):
        answer = deny("no", rule="<default>")
        _record(records.of_decision(NOBODY, Layer.SDK, value, answer, 10**18), value.target)


def _record(record: dict[str, Any], target: str) -> None:
    """One line of JSON that others read as well, one line of text, and no field of anybody's own."""
    attributes = records.bounded_attributes(record)
    line = records.line(record, attributes)
    assert line.count(b"\n") == 1 and json.loads(line) == record
    assert records.sentence(record).isprintable()
    names = set(_journal_fields(datagram(record, attributes)))
    assert names <= FIELDS, names - FIELDS


def _journal_fields(data: bytes) -> Iterator[str]:
    """The names in an entry of journald's native protocol."""
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, _ = line.partition(b"=")
        if equals:
            data = rest
        else:
            size = int.from_bytes(rest[:8], "little")
            assert rest[8 + size : 9 + size] == b"\n"
            data = rest[9 + size :]
        yield name.decode()
