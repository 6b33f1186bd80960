"""Sending records to journald in its native protocol, with a bounded wait.

`sd_journal_sendv`, and so pystemd's `journal.sendv`, waits without a limit
while journald does not read: the gateway would stop deciding because its log
is stuck. This sender waits a moment, which is enough for a busy journald, then
gives up and does not wait again before a record got through. Protocol:
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from aa.audit.record import MESSAGE_IDS, Record, priority, sentence

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
_LINES = 4 + len(_FIELDS)
"""Of an entry with attributes in which no field but `would` is empty."""


class Journal:
    """A datagram socket to journald. `send` returns False when the entry did not get there."""

    def __init__(self, path: Path = JOURNAL_SOCKET) -> None:
        self._path = os.fspath(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        patience = struct.pack("ll", 0, int(PATIENCE_SECONDS * 1e6))  # struct timeval
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._stuck = False
        self._connected = False

    def send(self, entry: bytes) -> bool:
        flags = socket.MSG_DONTWAIT if self._stuck else 0
        try:
            if self._connected:
                try:
                    self._sock.send(entry, flags)
                except (ConnectionError, FileNotFoundError):  # another socket is there now
                    self._connect()
                    self._sock.send(entry, flags)
            else:
                self._connect()
                self._sock.send(entry, flags)
        except OSError as e:  # not there, its queue is full, or too large: the caller counts it
            self._stuck = isinstance(e, BlockingIOError)
            return False
        self._stuck = False
        return True

    def _connect(self) -> None:
        self._connected = False
        self._sock.connect(self._path)
        self._connected = True

    def close(self) -> None:
        self._sock.close()


def datagram(record: Record, attributes: str) -> bytes:
    """A record as one journal entry, with its attributes as JSON. Empty fields are left out, as
    journalctl shows them so."""
    r = record
    told = sentence(r)
    # The usual record, in which all but `would` is said and nothing has a line feed, in one go.
    data = (
        f"MESSAGE={told}\nPRIORITY={priority(r)}\nMESSAGE_ID={MESSAGE_IDS[r['type']]}\n"
        f"SYSLOG_IDENTIFIER={IDENTIFIER}\nAA_SEQ={r['seq']}\nAA_TYPE={r['type']}\n"
        f"AA_LAYER={r['layer']}\nAA_KIND={r['kind']}\nAA_TARGET={r['target']}\n"
        f"AA_DECISION={r['decision']}\nAA_RULE={r['rule']}\nAA_REASON={r['reason']}\n"
        f"AA_POLICY={r['policy']}\nAA_MODE={r['mode']}\nAA_AGENT={r['agent']}\nAA_RUN={r['run']}\n"
        f"AA_USER={r['user']}\nAA_UID={r['uid']}\nAA_COUNT={r['count']}\nAA_TIME={r['time']}\n"
        f"AA_ATTRIBUTES={attributes}\n"
    )
    if r["attributes"] and not r["would"] and "=\n" not in data and data.count("\n") == _LINES:
        return data.encode("utf-8", "backslashreplace")
    parts = [
        _field("MESSAGE", told),
        _field("PRIORITY", str(priority(r))),
        _field("MESSAGE_ID", MESSAGE_IDS[r["type"]]),
        _field("SYSLOG_IDENTIFIER", IDENTIFIER),
    ]
    for name, key in _FIELDS.items():
        value = r[key]
        if value not in ("", None):
            parts.append(_field(name, str(value)))
    if r["attributes"]:
        parts.append(_field("AA_ATTRIBUTES", attributes))
    return b"".join(parts)


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)
    return b"%s=%s\n" % (name.encode(), data)
