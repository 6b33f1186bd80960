"""A run with a unit, and how it ended."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from aa.model import Run


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended. Both are None where nobody was there to see it."""

    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""

    def as_reply(self, run: str) -> dict[str, Any]:
        return {
            "event": "exited",
            "run": run,
            "notes": [],
            "exit_code": self.exit_code,
            "signal": self.signal,
            "reason": self.reason,
        }


@dataclass
class Live:
    """A run with a unit. `ended` is set once systemd is done with it and the gateway was told."""

    run: Run
    unit: str
    pid: int = 0
    pidfd: int = -1
    reason: str = ""
    """Why the program did not run, when the shim said so."""
    begun: bool = False
    """Whether the program was given the go-ahead."""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the run is frozen or let go."""
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    """Clear while it is frozen."""
    ended: asyncio.Future[End] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def __post_init__(self) -> None:
        self.goes_on.set()

    async def thawed(self) -> None:
        """Returns when it is not frozen, or over."""
        going: asyncio.Future[Any] = asyncio.ensure_future(self.goes_on.wait())
        either: set[asyncio.Future[Any]] = {going, self.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        going.cancel()

    def main_is_alive(self) -> bool:
        if self.pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
