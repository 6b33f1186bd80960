"""The workers, as the front keeps them: started, watched, replaced when they end, given connections.

A worker is a child of aa-proxy with the same user and the same sandbox. The front tells it of a
connection over a private channel and then connects to it on loopback; see `handover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aa.model import Kind, Layer, RecordType, Report
from aa.paths import ENFORCE_SOCKET, INSPECT_DIR
from aa.proxy.inspect.channel import Channel, ChannelClosed, channel_pair
from aa.proxy.inspect.handover import Inspected, NotTaken, hand_over
from aa.proxy.inspect.session import End, Session

PYTHON = "/usr/bin/python3"
PROGRAM = Path(__file__).with_name("__main__.py")
START_SECONDS = 20.0
"""How long a new worker may take until it serves."""
READY_SECONDS = 10.0
"""How long a connection waits for a worker that starts."""
SILENT_SECONDS = 15.0
"""A worker that says nothing for so long is stuck; it is killed and replaced."""
RESTART_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)
STEADY_SECONDS = 30.0
"""A worker that lived for so long starts the pauses anew when it ends."""
LOOK_SECONDS = 1.0
"""How often it is looked whether the package is there, as long as it is not."""
STOP_SECONDS = 4.0

MISSING = "the rule asks for inspection; install agent-assembly-inspect"

log = logging.getLogger(__name__)


class NoWorker(Exception):
    """Nothing can be inspected now; the message says why and what to do."""


class Worker:
    """One child. `port` is 0 until it serves, `gone` is set when it has ended."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self.process = process
        self.port = 0
        self.problem = ""
        self.status: dict[str, Any] = {}
        self.sessions: dict[str, asyncio.Future[End]] = {}
        self.gone = asyncio.Event()
        self.ready = asyncio.Event()
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self.heard = self._loop.time()
        self._loop.add_reader(channel.fileno(), self._read)

    def tell(self, **message: Any) -> bool:
        try:
            return self._channel.send(message)
        except ChannelClosed:
            return False

    def announce(self, session: Session) -> asyncio.Future[End]:
        """Tells of a connection that comes. Raises `NoWorker`."""
        if not self.tell(session=session.as_json()):
            raise NoWorker("the inspection worker does not keep up")
        ended: asyncio.Future[End] = self._loop.create_future()
        self.sessions[session.id] = ended
        return ended

    def forget(self, session: Session) -> None:
        self.sessions.pop(session.id, None)

    def _read(self) -> None:
        try:
            for message in self._channel.receive():
                self.heard = self._loop.time()
                self._take(message)
        except (ChannelClosed, ValueError, KeyError, TypeError) as e:
            log.debug("inspection worker %d: %s", self.process.pid, e)
            self._loop.remove_reader(self._channel.fileno())
            self.kill()

    def _take(self, message: dict[str, Any]) -> None:
        if "port" in message:
            self.port = int(message["port"])
            self.ready.set()
        elif "problem" in message:
            self.problem = str(message["problem"])
        elif "end" in message:
            end = End(**message["end"])
            ended = self.sessions.pop(end.id, None)
            if ended is not None and not ended.done():
                ended.set_result(end)
        elif "status" in message:
            self.status = dict(message["status"])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def bury(self) -> None:
        """Everything that waits for it hears that it is gone."""
        self.port = 0
        with contextlib.suppress(Exception):
            self._read()  # what it still said
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        for ended in self.sessions.values():
            if not ended.done():
                ended.set_result(End("", "the inspection worker ended", clean=False))
        self.sessions.clear()
        self.gone.set()


class Pool:
    """Keeps `count` workers while the package is installed. `keep` is its task."""

    def __init__(
        self,
        count: int,
        *,
        report: Callable[[Report], None],
        enforce: Path = ENFORCE_SOCKET,
        engine: Path = INSPECT_DIR,
        python: str = PYTHON,
        settings: Callable[[], dict[str, Any]] = dict,
        program: Path = PROGRAM,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._count = count
        self._report = report
        self._enforce = enforce
        self._engine = engine
        self._python = python
        self._settings = settings
        """What a new worker gets of the configuration."""
        self._program = program
        self._silent_seconds = silent_seconds
        self._workers: list[Worker] = []
        self._changed = asyncio.Event()
        self._stopping = False
        self._ended = ""
        """How the last worker ended."""
        self._problem = ""
        """The same, if it had not served."""
        self.restarts = 0
        self.on_port: Callable[[int], None] = lambda port: None
        """Called with each port that a worker listens on."""

    @property
    def installed(self) -> bool:
        return (self._engine / "mitmproxy").is_dir()

    def problem(self) -> str:
        """Why nothing can be inspected now; empty while a worker serves or is about to."""
        if not self.installed:
            return MISSING
        if self._problem and not any(w.port for w in self._workers):
            return f"inspection does not work: {self._problem}; see `aasm proxy logs`"
        return ""

    def status(self) -> dict[str, Any]:
        serving = [w for w in self._workers if w.port]
        return {
            "installed": self.installed,
            "workers": len(serving),
            "pids": [w.process.pid for w in serving],
            "restarts": self.restarts,
            "connections": sum(len(w.sessions) for w in serving),
            "requests": sum(int(w.status.get("requests", 0)) for w in serving),
            "rss_kb": [int(w.status.get("rss_kb", 0)) for w in serving],
            "engine": next((str(w.status.get("engine", "")) for w in serving), ""),
            "problem": self.problem(),
        }

    async def keep(self) -> None:
        """Keeps the workers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._count):
                group.create_task(self._keep_one())

    def reload(self) -> None:
        """The intermediate and the trust store are looked at again."""
        for worker in self._workers:
            worker.tell(reload=True)

    async def close(self) -> None:
        """Lets the workers hand over their last reports; ends them."""
        self._stopping = True
        for worker in self._workers:
            worker.tell(stop=True)
        deadline = asyncio.get_running_loop().time() + STOP_SECONDS
        for worker in list(self._workers):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await worker.process.wait()
            worker.kill()

    async def hand_over(self, session: Session, first: bytes, client: socket.socket) -> Inspected:
        """Gives a connection to the worker that has fewest. Raises `NoWorker`."""
        worker = await self._ready()
        ended = worker.announce(session)
        try:
            sock = await hand_over(session, worker.port, first)
        except NotTaken as e:
            worker.forget(session)
            raise NoWorker(f"the inspection worker did not take it: {e}") from None
        except BaseException:
            worker.forget(session)
            raise
        return Inspected(client, sock, ended, len(first))

    async def _ready(self) -> Worker:
        if self.problem():
            raise NoWorker(self.problem())
        deadline = asyncio.get_running_loop().time() + READY_SECONDS
        while True:
            serving = [w for w in self._workers if w.port]
            if serving:
                return min(serving, key=lambda w: len(w.sessions))
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise NoWorker(
                    self.problem() or f"no inspection worker within {READY_SECONDS:g} s"
                ) from None

    # -- one worker after the other

    async def _keep_one(self) -> None:
        failures = 0
        while True:
            while not self.installed:
                await asyncio.sleep(LOOK_SECONDS)
            began = time.monotonic()
            try:
                await self._live()
            except Exception as e:  # the front goes on without inspection
                log.exception("an inspection worker")
                self._ended = self._problem = f"it cannot be started: {e}"
            if self._stopping:
                return
            self.restarts += 1
            failures = 0 if time.monotonic() - began > STEADY_SECONDS else failures + 1
            self._tell_end()
            await asyncio.sleep(RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)])

    def _tell_end(self) -> None:
        log.error("an inspection worker ended: %s", self._ended)
        self._report(
            Report(
                type=RecordType.LIFECYCLE,
                layer=Layer.PROXY,
                kind=Kind.GUARD,
                target="inspect",
                time=time.time_ns(),
                reason=f"an inspection worker ended ({self._ended}); another one is started",
            )
        )

    async def _live(self) -> None:
        """One worker from start to end."""
        worker = await self._start()
        self._workers.append(worker)
        ended = asyncio.ensure_future(worker.process.wait())
        try:
            await self._serve(worker, ended)
        finally:
            worker.kill()
            code = await ended
            worker.bury()
            self._workers.remove(worker)
            self._ended = worker.problem or _ended(code)
            self._problem = "" if worker.ready.is_set() else self._ended
            self._changed.set()

    async def _serve(self, worker: Worker, ended: asyncio.Future[int]) -> None:
        ready = asyncio.ensure_future(worker.ready.wait())
        await asyncio.wait((ready, ended), timeout=START_SECONDS, return_when="FIRST_COMPLETED")
        ready.cancel()
        if not worker.ready.is_set():
            worker.problem = worker.problem or ("" if ended.done() else "it did not start in time")
            return
        self._problem = ""
        self.on_port(worker.port)
        self._changed.set()
        while not ended.done():
            await asyncio.wait((ended,), timeout=LOOK_SECONDS)
            silent = asyncio.get_running_loop().time() - worker.heard
            if silent > self._silent_seconds:
                worker.problem = f"it was stuck for {silent:.0f} s"
                return

    async def _start(self) -> Worker:
        ours, theirs = channel_pair()
        with theirs:
            settings = {"enforce": str(self._enforce), **self._settings()}
            process = await asyncio.create_subprocess_exec(
                self._python,
                "-I",
                "-B",
                str(self._program),
                str(self._engine),
                str(theirs.fileno()),
                json.dumps(settings),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
            )
        return Worker(process, Channel(ours))


def _environment() -> dict[str, str]:
    """Nothing of ours but how to log and where systemd put the credentials."""
    kept = ("JOURNAL_STREAM", "CREDENTIALS_DIRECTORY", "TZ")
    given = {name: os.environ[name] for name in kept if name in os.environ}
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **given}


def _ended(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with status {code}"
