"""The front's listeners, how many connections live, and how they end. See `connection` for one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from aa.model import Kind, deny
from aa.proxy.connection import Connection, Shared
from aa.proxy.splice import reset

ACCEPTS_PER_WAKE = 64
ACCEPT_PAUSE_SECONDS = 0.1
"""How long accepting rests when the process is out of descriptors."""
QUIET_SECONDS = 0.5
"""When stopping: connections in which nothing moved for this long are not waited for."""

log = logging.getLogger(__name__)


class Front:
    """Accepts on the listeners it is given and counts what lives."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.explicit: dict[socket.socket, bool] = {}
        """The listeners, and whether they speak to clients that know of the proxy."""
        self._loop = asyncio.get_running_loop()
        self._live: dict[asyncio.Task[None], Connection] = {}
        self._accepting = False

    @property
    def connections(self) -> int:
        return len(self._live)

    def listen(self, sock: socket.socket, *, explicit: bool) -> None:
        """Serves a listening socket from now on. What it sets is inherited by connections."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.explicit[sock] = explicit
        self.shared.own_ports.add(sock.getsockname()[1])
        self._accepting = True
        self._loop.add_reader(sock.fileno(), self._accept, sock)

    def problem(self) -> str:
        """Why a run cannot rely on this front; empty when it can."""
        if not self._accepting:
            return "the proxy is stopping"
        if False not in self.explicit.values():
            return "the proxy has no transparent listener; is aa-proxy.socket up?"
        for sock in self.explicit:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return f"nothing listens on {sock.getsockname()[:2]}"
        return ""

    def stop_accepting(self) -> None:
        """New connections wait in the listeners, which systemd holds, for the next front."""
        self._accepting = False
        for sock in self.explicit:
            self._loop.remove_reader(sock.fileno())

    async def drain(self, seconds: float) -> None:
        """Lets connections go on while bytes move in them, for so long at most; ends the rest."""
        deadline = self._loop.time() + seconds
        while self._live and self._loop.time() < deadline:
            quiet_before = self._loop.time() - QUIET_SECONDS
            if all(c.last_moved < quiet_before for c in self._live.values()):
                break
            await asyncio.sleep(0.05)
        for task in self._live:
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_WAKE):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:
                log.warning("accept: %s", e)
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume, listener)
                return
            self.shared.counts.accepted += 1
            if len(self._live) >= self.shared.limits.max_connections:
                self._turn_away(sock)
                continue
            sock.setblocking(False)
            connection = Connection(self.shared, sock, explicit=self.explicit[listener])
            task = self._loop.create_task(connection.serve())
            self._live[task] = connection
            task.add_done_callback(self._over)

    def _resume(self, listener: socket.socket) -> None:
        if self._accepting:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _turn_away(self, sock: socket.socket) -> None:
        """Over the total there is no room to find out who it is or to explain."""
        with contextlib.suppress(OSError):
            reset(sock)
        sock.close()
        self.shared.counts.denied += 1
        most = self.shared.limits.max_connections
        self.shared.refusals.refuse(
            deny(
                f"the proxy has {most} connections open; raise proxy.max_connections in "
                "agent-assembly.toml",
                rule="<limit:max_connections>",
            ),
            Kind.NET_CONNECT,
            "",
        )

    def _over(self, task: asyncio.Task[None]) -> None:
        self._live.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("a connection ended in an error", exc_info=task.exception())
