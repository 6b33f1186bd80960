"""A worker: takes the connections that the front announces, and has what is in them decided.

It listens on loopback for the front alone, ends when the front's channel does, and ignores the
signals that systemd sends to all of the service: the front ends it in its own time.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

from aa import prices
from aa.ca.errors import CertificateAuthorityError
from aa.ca.leaf import LeafIssuer
from aa.journallog import log_to_journal
from aa.proxy.ask import COUNTING_SECONDS, Gateway, Refusals
from aa.proxy.inspect.channel import Channel, ChannelClosed
from aa.proxy.inspect.session import End, Session, Waiting
from aa.report import Reporter
from aa.sockdiag import SockDiag

COMPONENT = "inspect"
BACKLOG = 1024
OUTBOX_LIMIT = 1 << 16
"""Messages to the front that wait; a front that does not read them has died or gone wrong."""

log = logging.getLogger(__name__)


class Worker:
    """The process. `live` is its life; it ends when the front says so or is gone."""

    def __init__(self, channel: Channel, settings: dict[str, Any]) -> None:
        from aa.proxy.inspect import engine, hooks, tls  # mitmproxy is there only in a worker

        engine.install()
        self._engine = engine
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._outbox: collections.deque[dict[str, Any]] = collections.deque()
        self._live: set[asyncio.Task[None]] = set()
        enforce = Path(settings["enforce"])
        self._limits = engine.Limits(
            float(settings["connect_seconds"]),
            float(settings["peek_seconds"]),
            float(settings["idle_seconds"]),
        )
        self._gateway = Gateway(
            socket=enforce,
            seconds=float(settings["decide_seconds"]),
            max_waiting=int(settings["max_waiting"]),
        )
        self._reporter = Reporter(COMPONENT, socket=enforce)
        self._refusals = Refusals(self._reporter.report)
        self._waiting = Waiting(self._loop.time)
        self._issuer = LeafIssuer(Path(settings["ca_dir"]))
        self._trusted = tls.Trusted(Path(settings.get("trust_store", tls.TRUST_STORE)))
        self._prices = prices.load()
        self._hooks = hooks.Hooks(
            gateway=self._gateway,
            refusals=self._refusals,
            report=self._reporter.report,
            waiting=self._waiting,
            pump=self._read,
            presented=tls.Presented(self._issuer),
            trusted=self._trusted,
            diag=SockDiag(),
            prices=lambda: self._prices,
            max_waiting_per_run=int(settings["max_waiting_per_run"]),
        )
        self._table = self._hooks.table()

    async def live(self) -> None:
        self._trusted.prepare()
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        # asyncio sets this only for sockets whose protocol was named when they were made
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = await asyncio.start_server(self._serve, sock=listener)
        self._loop.add_reader(self._channel.fileno(), self._read)
        gc.collect()
        gc.freeze()
        tasks = [
            self._loop.create_task(self._reporter.run()),
            self._loop.create_task(self._keep_house()),
        ]
        self._tell(port=listener.getsockname()[1])
        await self._stop.wait()
        server.close()
        for task in self._live:
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)
        self._refusals.flush()
        await self._reporter.close()
        await self._gateway.close()
        for task in tasks:
            task.cancel()

    # -- one connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        connection = self._engine.Connection(reader, writer, hooks=self._table, limits=self._limits)
        try:
            await connection.serve()
        except Exception:
            log.exception("an inspected connection")
            connection.abort("the inspection failed on this connection")
        finally:
            self._live.discard(task)
            self._tell_end(connection)
            writer.close()

    def _tell_end(self, connection: Any) -> None:
        session: Session | None = connection.state.session
        if session is None:
            return
        end = End(
            session.id,
            connection.ended or "closed",
            connection.requests,
            connection.upstream,
            not connection.state.broken,
        )
        self._tell(end=end.as_json())

    # -- the front

    def _read(self) -> None:
        try:
            for message in self._channel.receive():
                self._take(message)
        except ChannelClosed:
            self._loop.remove_reader(self._channel.fileno())
            self._stop.set()

    def _take(self, message: dict[str, Any]) -> None:
        if "session" in message:
            try:
                self._waiting.add(Session.from_json(message["session"]))
            except (KeyError, TypeError, ValueError) as e:
                log.error("a connection that cannot be understood: %s", e)
        elif "reload" in message:
            self._reload()
        elif "stop" in message:
            self._stop.set()

    def _reload(self) -> None:
        """Takes another intermediate, trust store and prices into use. What was begun goes on."""
        try:
            self._issuer.reread()
        except CertificateAuthorityError as e:
            log.warning("the intermediate in use stays: %s", e)
        self._trusted.prepare()
        self._prices = prices.load()

    def _tell(self, **message: Any) -> None:
        if len(self._outbox) < OUTBOX_LIMIT:
            self._outbox.append(message)
        self._send()

    def _send(self) -> None:
        with contextlib.suppress(ChannelClosed):
            while self._outbox and self._channel.send(self._outbox[0]):
                self._outbox.popleft()

    async def _keep_house(self) -> None:
        while True:
            self._refusals.flush()
            self._send()
            self._tell(status=self._status())
            await asyncio.sleep(COUNTING_SECONDS / 4)

    def _status(self) -> dict[str, Any]:
        from mitmproxy import version

        return {
            "requests": self._hooks.requests,
            "connections": len(self._live),
            "rss_kb": _resident_kb(),
            "engine": f"mitmproxy {version.VERSION}",
        }


def _resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


async def _live(channel: Channel, settings: dict[str, Any]) -> None:
    await Worker(channel, settings).live()


def main(descriptor: int, settings: str) -> int:
    """Returns the exit status."""
    log_to_journal()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        asyncio.run(_live(channel, json.loads(settings)))
    except Exception as e:
        log.exception("the worker")
        with contextlib.suppress(ChannelClosed):
            channel.send({"problem": f"{type(e).__name__}: {e}"[:500]})
        return 1
    return 0
