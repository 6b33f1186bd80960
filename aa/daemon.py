"""What every daemon here does alike: speak to systemd, keep its watchdog, end on a signal.

`serve` runs one coroutine as the daemon's life. A daemon that cannot start says
why in one line with what to do about it, in the journal and in `STATUS=`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pystemd import daemon as sd

from aa.journallog import log_to_journal


class CannotStart(Exception):
    """The daemon cannot do its work; `hint` says what a person can do."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.hint = hint
        super().__init__(f"{what}; {hint}" if hint else what)


def inherited_sockets() -> list[socket.socket]:
    """The sockets that systemd listens on for this service, in the order of its units."""
    first = 3  # SD_LISTEN_FDS_START
    count = sd.listen_fds(True)
    return [socket.socket(fileno=first + i) for i in range(count)]


@dataclass
class Daemon:
    """The link to systemd while the daemon lives. `stop` is set when it is to end."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reload: Callable[[], Awaitable[None] | None] | None = None
    """Called on SIGHUP, if set; a failure must leave the last good state in force."""
    _status: str = ""

    def ready(self, status: str) -> None:
        self._status = status
        sd.notify(False, ready=1, status=status)

    def status(self, text: str) -> None:
        """One line for `systemctl status`. Cheap when nothing changed."""
        if text != self._status:
            self._status = text
            sd.notify(False, status=text)

    async def _on_hangup(self) -> None:
        if self.reload is None:
            return
        sd.notify(False, reloading=1)
        try:
            pending = self.reload()
            if pending is not None:
                await pending
        finally:
            sd.notify(False, ready=1, status=self._status)

    async def _watchdog(self) -> None:
        """Pats systemd's watchdog from the loop itself, so a stuck loop is noticed."""
        interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
        while interval > 0:
            sd.notify(False, watchdog=1)
            await asyncio.sleep(interval)


async def _live(main: Callable[[Daemon], Awaitable[None]]) -> None:
    daemon = Daemon()
    loop = asyncio.get_running_loop()
    hangups: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = loop.create_task(daemon._on_hangup())
        hangups.add(task)
        task.add_done_callback(hangups.discard)

    loop.add_signal_handler(signal.SIGTERM, daemon.stop.set)
    loop.add_signal_handler(signal.SIGINT, daemon.stop.set)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    watchdog = loop.create_task(daemon._watchdog())
    try:
        await main(daemon)
    finally:
        sd.notify(False, stopping=1)
        watchdog.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watchdog


def serve(main: Callable[[Daemon], Awaitable[None]]) -> int:
    """Runs a daemon until `Daemon.stop`; returns its exit status.

    `main` sets itself up, calls `Daemon.ready` and waits for `Daemon.stop`.
    """
    log_to_journal()
    try:
        asyncio.run(_live(main))
    except CannotStart as e:
        logging.getLogger(__name__).error("%s", e)
        sd.notify(False, status=f"cannot start: {e}")
        return 1
    return 0
