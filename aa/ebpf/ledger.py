"""Accounts for every event: what the kernel counted against what was reported. No I/O.

The kernel's counters only grow and outlive the service, and so does a copy of what
was reported. What is missing in between, because a table was too small or a reader
was killed with events in its hands, becomes a gap with a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aa.ebpf.tables import Count

SAMPLES = 3
"""A difference counts as missing when this many looks in a row show at least as much: an event
may be counted already and not be readable yet."""


@dataclass(frozen=True, slots=True)
class Gap:
    kind: int
    count: int
    why: str


WHY = {
    "lost": "the ring was full",
    "tallied": "the table of tallies was full",
    "events": "a reader ended with events in its hands",
}


class Ledger:
    """What was read and what was reported so far, by kind, in the columns the kernel counts in."""

    def __init__(self, reported: Mapping[int, Count] | None = None) -> None:
        self._read: dict[int, Count] = dict(reported or {})
        self._reported: dict[int, Count] = dict(self._read)
        self.settled: dict[int, Count] = dict(self._read)
        """What a next service has to start from when this one is killed now."""
        self._open: dict[tuple[int, str], list[int]] = {}

    def read(self, kind: int, *, events: int = 0, tallied: int = 0) -> None:
        self._add((self._read,), kind, Count(events=events, tallied=tallied))

    def report(self, kind: int, *, events: int = 0, tallied: int = 0) -> None:
        """These were handed to the reporter; they are settled when the gateway has them."""
        self._add((self._reported,), kind, Count(events=events, tallied=tallied))

    def dismiss(self, kind: int, *, events: int = 0, tallied: int = 0) -> None:
        """These need no record."""
        more = Count(events=events, tallied=tallied)
        self._add((self._reported, self.settled), kind, more)

    def settle(self) -> None:
        """The gateway has answered for everything that was reported."""
        self.settled = dict(self._reported)

    def gaps(self, counted: Mapping[int, Count], *, idle: bool) -> list[Gap]:
        """What is missing for good; each is returned once.

        `counted` was read just before, `idle` says that the ring was empty then.
        """
        found = []
        for kind, kernel in counted.items():
            for column, why in WHY.items():
                if column == "lost" or idle:
                    missing = self._missing(kind, column, getattr(kernel, column))
                    if missing:
                        found.append(Gap(kind, missing, why))
        return found

    def _missing(self, kind: int, column: str, kernel: int) -> int:
        missing: int = kernel - getattr(self._of(self._read, kind), column)
        if column != "lost":  # what the ring refused cannot be under way
            samples = self._open.setdefault((kind, column), [])
            samples.append(missing)
            del samples[:-SAMPLES]
            missing = min(samples) if len(samples) == SAMPLES else 0
        if missing <= 0:
            return 0
        self._open.pop((kind, column), None)
        self._add((self._read, self._reported), kind, Count(**{column: missing}))
        return missing

    def _add(self, books: Iterable[dict[int, Count]], kind: int, more: Count) -> None:
        for book in books:
            book[kind] = self._of(book, kind).plus(more)

    @staticmethod
    def _of(book: Mapping[int, Count], kind: int) -> Count:
        return book.get(kind, Count())
