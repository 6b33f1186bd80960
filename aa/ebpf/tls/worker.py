"""One thread for what may block: reading files of agents, and putting probes into them."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Does one job after the other. A daemon thread: a file system that hangs holds up nobody's end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._began = 0.0
        self._thread = threading.Thread(target=self._work, name="tls", daemon=True)
        self._thread.start()

    async def do(self, job: Callable[[], T]) -> T:
        done: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((job, done))
        return await done

    def busy_seconds(self) -> float:
        """How long the job of now has been going on."""
        began = self._began
        return time.monotonic() - began if began else 0.0

    def stop(self) -> None:
        """After the jobs that wait; does not wait itself."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            self._began = time.monotonic()
            try:
                result, error = job(), None
            except Exception as e:  # belongs to whoever waits
                result, error = None, e
            self._began = 0.0
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(_finish, done, result, error)


def _finish(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)
