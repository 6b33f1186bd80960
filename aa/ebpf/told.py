"""What was told already, kept in pinned maps of the loader's own, so that a new service goes on from there."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping

from aa.ebpf import libbpf, tables
from aa.ebpf.libbpf import BpfError
from aa.ebpf.loader import TALLY_KEY_SIZE, Loader
from aa.ebpf.tables import Count

MAX_TOLD = 2 * tables.MAX_TALLIES
"""Room for what the kernel forgets and learns anew between two sweeps."""

_TOTAL = struct.Struct("=Q")

log = logging.getLogger(__name__)


class Told:
    """The totals of tallies that were reported, and the ledger's copy."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._totals = loader.pinned_map(
            "aa_told",
            {
                "type": libbpf.MAP_HASH,
                "key": TALLY_KEY_SIZE,
                "value": _TOTAL.size,
                "entries": MAX_TOLD,
            },
        )
        self._ledger = loader.pinned_map(
            "aa_reported",
            {
                "type": libbpf.MAP_ARRAY,
                "key": 4,
                "value": tables.COUNT_SIZE,
                "entries": tables.KINDS,
            },
        )
        self._saved: dict[int, Count] = {}

    def more(self, raw: bytes, total: int) -> int:
        """How many of a tally's total are new; they count as told from now on."""
        held = libbpf.map_lookup(self._totals, raw, _TOTAL.size)
        new = _new(total, _TOTAL.unpack(held)[0] if held else 0)
        if new:
            self._put(raw, total)
        return new

    def sweep(self, tallies: Mapping[bytes, int]) -> Iterator[tuple[bytes, int]]:
        """What is new in the whole table, and forgets what the kernel has forgotten."""
        told = self._all()
        for raw in told.keys() - tallies.keys():
            libbpf.map_delete(self._totals, raw)
        for raw, total in tallies.items():
            new = _new(total, told.get(raw, 0))
            if new:
                self._put(raw, total)
                yield raw, new

    def reported(self) -> dict[int, Count]:
        """The ledger as an earlier service left it."""
        found = {}
        for kind in range(1, tables.KINDS):
            raw = libbpf.map_lookup(self._ledger, tables.index(kind), tables.COUNT_SIZE)
            if raw and any(raw):
                found[kind] = Count.unpack(raw)
        self._saved = dict(found)
        return found

    def save(self, reported: Mapping[int, Count]) -> None:
        for kind, count in reported.items():
            if self._saved.get(kind) != count:
                libbpf.map_update(self._ledger, tables.index(kind), count.pack())
                self._saved[kind] = count

    def _all(self) -> dict[bytes, int]:
        items = libbpf.map_items(self._totals, TALLY_KEY_SIZE, _TOTAL.size, MAX_TOLD)
        return {raw: _TOTAL.unpack(value)[0] for raw, value in items.items()}

    def _put(self, raw: bytes, total: int) -> None:
        try:
            libbpf.map_update(self._totals, raw, _TOTAL.pack(total))
        except BpfError as e:
            # Full until the next sweep: then this is told twice, which a reader can see.
            log.warning("%s", e)


def _new(total: int, told: int) -> int:
    """A total below what was told belongs to a tally that was forgotten and began again."""
    return total - told if total >= told else total
