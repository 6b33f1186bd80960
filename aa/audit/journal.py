"""Sending records to journald in its native protocol, with a bounded wait.

`sd_journal_sendv`, and so pystemd's `journal.sendv`, waits without a limit
while journald does not read: the gateway would stop deciding because its log
is stuck. This sender waits a moment, which is enough for a busy journald, then
gives up and does not wait again before a record got through. Protocol:
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path

from aa.audit.record import MESSAGE_IDS, Record, priority, sentence
from aa.model import RecordType

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "agent-assembly"

PATIENCE_SECONDS = 0.05
"""The longest wait for journald to make room, once for each time that it is stuck."""

_FIELDS = {
    "AA_SEQ": "seq",
    "AA_TYPE": "type",
    "AA_LAYER": "layer",
    "AA_KIND": "kind",
    "AA_TARGET": "target",
    "AA_DECISION": "decision",
    "AA_RULE": "rule",
    "AA_REASON": "reason",
    "AA_POLICY": "policy",
    "AA_MODE": "mode",
    "AA_WOULD": "would",
    "AA_AGENT": "agent",
    "AA_RUN": "run",
    "AA_USER": "user",
    "AA_UID": "uid",
    "AA_COUNT": "count",
    "AA_TIME": "time",
}


class Journal:
    """A datagram socket to journald. `send` returns False when the record did not get there."""

    def __init__(self, path: Path = JOURNAL_SOCKET) -> None:
        self._path = os.fspath(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        patience = struct.pack("ll", 0, int(PATIENCE_SECONDS * 1e6))  # struct timeval
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._stuck = False

    def send(self, record: Record) -> bool:
        try:
            self._sock.sendto(
                datagram(record), socket.MSG_DONTWAIT if self._stuck else 0, self._path
            )
        except OSError as e:  # not there, its queue is full, or too large: the caller counts it
            self._stuck = isinstance(e, BlockingIOError)
            return False
        self._stuck = False
        return True

    def close(self) -> None:
        self._sock.close()


def datagram(record: Record) -> bytes:
    """A record as one journal entry. Empty fields are left out, as journalctl shows them so."""
    parts = [
        _field("MESSAGE", sentence(record)),
        _field("PRIORITY", str(priority(record))),
        _field("MESSAGE_ID", MESSAGE_IDS[RecordType(record["type"])]),
        _field("SYSLOG_IDENTIFIER", IDENTIFIER),
    ]
    for name, key in _FIELDS.items():
        value = record[key]
        if value not in ("", None):
            parts.append(_field(name, str(value)))
    if record["attributes"]:
        parts.append(_field("AA_ATTRIBUTES", json.dumps(record["attributes"])))
    return b"".join(parts)


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)
    return b"%s=%s\n" % (name.encode(), data)
