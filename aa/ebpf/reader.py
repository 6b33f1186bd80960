"""One thread that reads the ring and hands batches to the event loop.

When the loop falls behind, the thread stops reading: then the ring fills, and the
kernel counts what does not fit. Nothing here grows without a bound.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
from collections.abc import Callable

from aa.ebpf.libbpf import Ring

MAX_BATCH = 512
"""Records of one batch."""
MAX_BATCHES = 8
"""Batches that the loop has not taken yet."""
STOP_SECONDS = 2.0

log = logging.getLogger(__name__)


class RingReader:
    """Reads a ring from `start` to `stop`; `take` runs in the event loop, in the ring's order."""

    def __init__(self, ring_fd: int, take: Callable[[list[bytes]], None]) -> None:
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._batch: list[bytes] = []
        self._room = threading.Semaphore(MAX_BATCHES)
        self._stop = threading.Event()
        self._woken, self._wake = os.pipe()
        self._ring = Ring(ring_fd, self._keep)
        self._handed = 0  # batches given to the loop; written by the thread only
        self._taken = 0  # batches taken by it; written by the loop only
        self._empty = False
        self._thread = threading.Thread(target=self._read, name="ring", daemon=True)
        self.failure: Exception | None = None
        """Why the thread ended by itself; the service must not go on without it."""

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread and hands over what it had read already."""
        self._stop.set()
        os.write(self._wake, b"\0")
        self._room.release()
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        await asyncio.sleep(0)  # batches that the thread left with the loop
        if self._thread.is_alive():
            log.error("the ring's thread did not end; it ends with the process")
            return
        self._ring.close()
        os.close(self._wake)
        os.close(self._woken)

    @property
    def idle(self) -> bool:
        """True when the ring was empty at the last look and no batch is under way."""
        return self._empty and self._handed == self._taken

    def _keep(self, record: bytes) -> bool:
        self._batch.append(record)
        return len(self._batch) < MAX_BATCH

    def _read(self) -> None:
        try:
            with select.epoll() as poll:
                poll.register(self._ring.fileno(), select.EPOLLIN)
                poll.register(self._woken, select.EPOLLIN)
                while not self._stop.is_set():
                    self._drain()
                    poll.poll()
        except Exception as e:  # told to the service, which ends itself
            self.failure = e
            log.exception("reading the ring")

    def _drain(self) -> None:
        """Reads until the ring is empty. Level-triggered polling would spin on what is left."""
        empty = False
        while not empty and not self._stop.is_set():
            self._room.acquire()
            if self._stop.is_set():
                self._room.release()
                return
            empty = self._ring.consume()
            batch, self._batch = self._batch, []
            self._handed += bool(batch)
            self._empty = empty
            if not batch:
                self._room.release()
                continue
            self._loop.call_soon_threadsafe(self._hand_over, batch)

    def _hand_over(self, batch: list[bytes]) -> None:
        try:
            self._take(batch)
        finally:
            self._taken += 1
            self._room.release()
