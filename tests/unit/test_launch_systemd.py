"""What is read of a unit while it changes under the reader's eyes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aa.launch.systemd import EXITED, KILLED, Systemd

Facts = dict[bytes, Any]

ALIVE: Facts = {
    b"LoadState": b"loaded",
    b"InactiveExitTimestampMonotonic": 7_000_000,
    b"ActiveState": b"active",
    b"Result": b"success",
    b"MainPID": 12,
    b"ControlGroup": b"/aa.slice/aa-agent-1.service",
    b"ExecMainCode": 0,
    b"ExecMainStatus": 0,
}
ENDED: Facts = {**ALIVE, b"ActiveState": b"failed", b"Result": b"exit-code", b"MainPID": 0}


WAITING: Facts = {
    **ALIVE,
    b"InactiveExitTimestampMonotonic": 0,
    b"ActiveState": b"inactive",
    b"MainPID": 0,
}


class Changing(Systemd):
    """A unit that becomes another after its reader has read `reads` of its properties."""

    def __init__(self, reads: int, first: Facts, then: Facts) -> None:
        super().__init__()
        self._reads, self._first, self._then = reads, first, then

    def _try(self, call: Callable[[Any], Any]) -> Any:
        return call(self)

    def get_property(self, _where: bytes, _path: bytes, _on: bytes, name: bytes, _s: bytes) -> Any:
        self._reads -= 1
        return (self._first if self._reads >= 0 else self._then)[name]


@pytest.mark.parametrize("reads", range(len(ALIVE) + 2))
@pytest.mark.parametrize("code, status", [(EXITED, 3), (EXITED, 0), (KILLED, 9)])
def test_a_unit_that_is_over_has_its_status_however_it_ended_meanwhile(
    reads: int, code: int, status: int
) -> None:
    end = {**ENDED, b"ExecMainCode": code, b"ExecMainStatus": status}
    state = Changing(reads, ALIVE, end).state("aa-agent-1.service")
    told = state.exit_code if code == EXITED else state.signal
    assert told == status if state.over else state.active == "active"


@pytest.mark.parametrize("reads", range(len(ALIVE) + 2))
def test_a_unit_whose_start_waits_for_its_turn_is_not_over(reads: int) -> None:
    assert not Changing(reads, WAITING, ALIVE).state("aa-agent-1.service").over
