"""The names that our resolver gave a run for an address: the only ones opaque connections have."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable

from aa.proxy.hostdns import Address

RUNS_LIMIT = 512
ADDRESSES_PER_RUN = 2048
LEAST_SECONDS = 30.0
"""A name is remembered at least so long: programs connect a moment after they asked."""
MOST_SECONDS = 3600.0


class AnsweredNames:
    """Names by run and address, the oldest given up first. The latest answer counts."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, OrderedDict[Address, tuple[str, float]]] = OrderedDict()

    def remember(self, run: str, name: str, addresses: Iterable[Address], seconds: float) -> None:
        until = time.monotonic() + min(max(seconds, LEAST_SECONDS), MOST_SECONDS)
        of_run = self._runs.setdefault(run, OrderedDict())
        self._runs.move_to_end(run)
        for address in addresses:
            of_run[address] = (name, until)
            of_run.move_to_end(address)
        while len(of_run) > ADDRESSES_PER_RUN:
            of_run.popitem(last=False)
        while len(self._runs) > RUNS_LIMIT:
            self._runs.popitem(last=False)

    def name_of(self, run: str, address: Address) -> str | None:
        known = self._runs[run].get(address) if run in self._runs else None
        return known[0] if known is not None and known[1] > time.monotonic() else None
