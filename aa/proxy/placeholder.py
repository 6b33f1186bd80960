"""Addresses that stand for a name about which a person must be asked before it is resolved.

A query is data that leaves. So a name that only an `ask` rule lets through is answered with an
address that is nobody's, and the connection that then comes to it is held, by name, for a person's
answer. No placeholder is ever dialled.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field

NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
"""For benchmarks of network devices (RFC 2544): routed nowhere, and guarded like a private one."""
RUNS_LIMIT = 512
NAMES_PER_RUN = 1024
"""Names of one run that have a placeholder; the one that was not asked for the longest goes first."""
TTL = 5
"""Seconds that a client may keep one. What it keeps longer works all the same."""

_FIRST = int(NETWORK.network_address) + 1
_COUNT = NETWORK.num_addresses - 2


@dataclass(slots=True)
class _OfRun:
    addresses: OrderedDict[str, int] = field(default_factory=OrderedDict)
    names: dict[int, str] = field(default_factory=dict)
    given: int = 0


class Placeholders:
    """By run and name. An address means something for the run that it was given to alone."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _OfRun] = OrderedDict()

    def give(self, run: str, name: str) -> ipaddress.IPv4Address:
        of_run = self._runs.setdefault(run, _OfRun())
        self._runs.move_to_end(run)
        if len(self._runs) > RUNS_LIMIT:
            self._runs.popitem(last=False)
        number = of_run.addresses.get(name)
        if number is None:
            number = _FIRST + of_run.given % _COUNT
            of_run.given += 1
            of_run.addresses[name] = number
            of_run.names[number] = name
            if len(of_run.addresses) > NAMES_PER_RUN:
                _, old = of_run.addresses.popitem(last=False)
                del of_run.names[old]
        of_run.addresses.move_to_end(name)
        return ipaddress.IPv4Address(number)

    def name_of(self, run: str, address: object) -> str | None:
        of_run = self._runs.get(run)
        if of_run is None or not isinstance(address, ipaddress.IPv4Address):
            return None
        return of_run.names.get(int(address))
