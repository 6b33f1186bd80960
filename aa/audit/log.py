"""The one writer: numbers records, writes each to the file and to the journal, and never loses one silently.

Outcomes when something is broken, each said in the log itself once it can be:
- the journal does not take records: they are in the file, and the journal gets a gap record with
  their number when it is back;
- the file does not (full disk): they are in the journal, and the file gets the gap record;
- neither does: `write` raises `AuditUnavailable`, and the gateway denies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from aa.audit.file import AuditFile
from aa.audit.journal import Journal, datagram
from aa.audit.record import NOBODY, Record, bounded_attributes, line, of_report
from aa.model import Kind, Layer, RecordType, Report

log = logging.getLogger(__name__)


class AuditUnavailable(Exception):
    """No record can be kept, so nothing may be allowed."""


class AuditLog:
    """Give it records; it numbers and keeps them."""

    def __init__(self, file: AuditFile, journal: Journal | None) -> None:
        self._file = file
        self._journal = journal
        self._sequence = file.last_sequence()
        self._missing_in_file = 0
        self._missing_in_journal = 0
        self._followers: set[Callable[[Record], None]] = set()
        self.records = 0
        self.gaps = 0

    @property
    def problems(self) -> list[str]:
        """What is wrong with the log now, in sentences."""
        found = []
        if self._missing_in_file:
            found.append(f"{self._missing_in_file} records are missing in {self._file.path}")
        if self._missing_in_journal:
            found.append(f"{self._missing_in_journal} records are missing in the journal")
        return found

    def follow(self, follower: Callable[[Record], None]) -> Callable[[], None]:
        """Calls `follower` with each new record; returns the function that ends it."""
        self._followers.add(follower)
        return lambda: self._followers.discard(follower)

    def write(self, record: Record) -> int:
        """Keeps a record and returns its size in bytes.

        Raises `AuditUnavailable` when neither file nor journal took it.
        """
        self._sequence += 1
        record["seq"] = self._sequence
        attributes = bounded_attributes(record)
        data = line(record, attributes)
        in_file = self._write_file(record["seq"], data)
        in_journal = self._write_journal(record, attributes)
        if not in_file and not in_journal:
            self._sequence -= 1
            raise AuditUnavailable("neither the audit file nor the journal takes records")
        if not in_file:
            self._missing_in_file += 1
        if not in_journal and self._journal is not None:
            self._missing_in_journal += 1
        self.records += 1
        if record["type"] == "gap":
            self.gaps += 1
        if self._followers:
            for follower in list(self._followers):
                follower(record)
        return len(data)

    def _write_file(self, sequence: int, data: bytes) -> bool:
        try:
            if self._missing_in_file:
                gap = self._gap("file", self._missing_in_file, sequence)
                self._file.write(line(gap, bounded_attributes(gap)))
                self._missing_in_file = 0
            self._file.write(data)
        except OSError as e:
            if not self._missing_in_file:
                log.error("audit file: %s; records go to the journal alone", e)
            return False
        return True

    def _write_journal(self, record: Record, attributes: str) -> bool:
        if self._journal is None:
            return False
        if self._missing_in_journal:
            gap = self._gap("journal", self._missing_in_journal, record["seq"])
            if not self._journal.send(datagram(gap, bounded_attributes(gap))):
                return False
            self._missing_in_journal = 0
        return self._journal.send(datagram(record, attributes))

    def _gap(self, place: str, count: int, before: int) -> Record:
        other = "journal" if place == "file" else "file"
        gap = of_report(
            NOBODY,
            Report(
                type=RecordType.GAP,
                layer=Layer.GATEWAY,
                kind=Kind.GUARD,
                target=place,
                time=time.time_ns(),
                reason=f"{count} records before number {before} are in the {other} only",
                count=count,
            ),
            "",
            None,
        )
        gap["seq"] = before - 1  # it stands in for the records up to this one
        self.gaps += 1
        return gap


def matches(record: Record, fields: dict[str, Any]) -> bool:
    """True when a record has every given value (compared as text)."""
    return all(str(record.get(k, "")) == v for k, v in fields.items())


def newest(records: Iterable[Record], fields: dict[str, Any], lines: int) -> list[Record]:
    """Of records that come newest first: the first `lines` that match, oldest first."""
    found: list[Record] = []
    if lines > 0:
        for record in records:
            if matches(record, fields):
                found.append(record)
                if len(found) >= lines:
                    break
    found.reverse()
    return found
