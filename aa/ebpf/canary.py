"""Proves the rung: a child in a cgroup of its own below the guarded slice tries what must fail and what must work.

That programs are attached says little: a child that was refused, and counted by our
own program in the kernel, says that the guard guards; its events in the ring say
that we see. The service has a network namespace of its own, so no firewall rule can
refuse in the guard's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aa.ebpf import events
from aa.ebpf.events import Event, MalformedRecord, Net
from aa.ebpf.libbpf import BpfError
from aa.ebpf.loader import Loader, Place
from aa.paths import DNS_PORT

CGROUP_NAME = "aa-canary"
CHILD = Path(__file__).with_name("canary_child.py")
CHILD_SECONDS = 10.0
EVENT_SECONDS = 3.0
"""How long the canary's events may take to come out of the ring."""
CLOSED_PORT = 9
"""Discard: nobody listens, and it is no end of the proxy."""

_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_WANTED = frozenset({"exec", "exit", "connect", "datagram"})


@dataclass(frozen=True, slots=True)
class Proof:
    """What one canary showed. Empty tuples mean proved."""

    guard: tuple[str, ...]
    observe: tuple[str, ...]


class Canary:
    """Sends canaries out. `saw` gets every event of the ring and keeps its own."""

    def __init__(self, loader: Loader, allowed_port: int = DNS_PORT) -> None:
        self._loader = loader
        self._allowed = allowed_port  # of one of the proxy's own ends
        self._cgroups: set[int] = set()
        self._seen: set[str] = set()
        self._wanted = _WANTED
        self._enough = asyncio.Event()

    def saw(self, cgroup: int, event: Event | None) -> bool:
        """True when this was a canary's, and so is nobody's record."""
        if cgroup not in self._cgroups:
            return False
        if event is not None:
            self._seen.add(_name(event))
            if self._seen >= self._wanted:
                self._enough.set()
        return True

    async def fly(self) -> Proof:
        """One flight. Never raises: what goes wrong is no proof, and says so."""
        try:
            return await self._fly()
        except (OSError, BpfError, ValueError, TimeoutError) as e:
            why = (f"the canary could not fly: {e or type(e).__name__}",)
            return Proof(why, why)

    async def _fly(self) -> Proof:
        slices = self._loader.slices
        guarded = not self._loader.problems(Place.PROXY)
        directory = slices.root / slices.path(Place.PROXY if guarded else Place.AGENTS)
        for leftover in directory.glob(f"{CGROUP_NAME}-*"):  # of a life that was killed in flight
            _remove(leftover)
        # A cgroup that is new to the kernel's tables: what they know of an old one they do not tell again.
        directory /= f"{CGROUP_NAME}-{time.monotonic_ns()}"
        directory.mkdir()
        own = directory.stat().st_ino
        self._loader.announce_canary(own)
        self._cgroups = {own}  # of the last flight: its late events are forgotten with it
        self._seen.clear()
        self._enough.clear()
        self._wanted = _WANTED | ({"file"} if self._loader.files_watched else set())
        before = refusals(self._loader.tallies(), own)
        try:
            tried = await _send_child(directory, self._allowed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVENT_SECONDS):
                    await self._enough.wait()
        finally:
            _remove(directory)
        after = refusals(self._loader.tallies(), own)
        unseen = self._wanted - self._seen
        if not self._loader.files_watched:  # any more
            unseen -= {"file"}
        observe = tuple(f"the canary's {x} was not seen" for x in sorted(unseen))
        return Proof(tuple(judge(tried, before, after, self._allowed)), observe)


def _remove(directory: Path) -> None:
    with contextlib.suppress(
        OSError
    ):  # a child that has not quite gone: the next flight removes it
        directory.rmdir()


def refusals(tallies: dict[bytes, int], cgroup: int) -> dict[tuple[int, int], int]:
    """How often the guard refused something of one cgroup, by reason and port or protocol."""
    found = {}
    for raw, total in tallies.items():
        try:
            key = events.tally_key(raw)
        except MalformedRecord:
            continue
        if key.cgroup == cgroup and key.reason:
            what = key.protocol if key.reason == events.REFUSED_SOCKET else key.port
            found[key.reason, what] = total
    return found


def judge(
    tried: dict[str, Any],
    before: dict[tuple[int, int], int],
    after: dict[tuple[int, int], int],
    allowed_port: int = DNS_PORT,
) -> Iterable[str]:
    """What is wrong with the guard, seen from a canary: its errnos and the kernel's counts."""

    def counted(reason: int, what: int) -> bool:
        return after.get((reason, what), 0) > before.get((reason, what), 0)

    if tried["refused"] == 0:
        yield "a packet to a closed port was let through"
    elif not counted(events.REFUSED_END, CLOSED_PORT):
        yield f"a packet was refused by something else ({_errno(tried['refused'])})"
    if tried["allowed"] != 0 or counted(events.REFUSED_END, allowed_port):
        yield f"a packet to the proxy's own end was refused ({_errno(tried['allowed'])})"
    for name, error in tried["sockets"].items():
        if error == 0:
            yield f"a socket of kind {name} was made"
    if not any(reason == events.REFUSED_SOCKET and counted(reason, p) for reason, p in after):
        yield "no socket was refused by the guard"


async def _send_child(directory: Path, allowed_port: int) -> dict[str, Any]:
    child = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        _JOIN,
        str(directory),
        sys.executable,
        "-I",
        "-S",
        str(CHILD),
        str(CLOSED_PORT),
        str(allowed_port),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
    )
    try:
        async with asyncio.timeout(CHILD_SECONDS):
            out, err = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        raise TimeoutError("no answer from the child") from None
    if child.returncode != 0:
        raise OSError(errno.ECHILD, err.decode(errors="replace").strip()[-300:])
    tried = json.loads(out)
    if not isinstance(tried, dict) or set(tried) != {"refused", "allowed", "sockets"}:
        raise ValueError("an answer that is none")
    return tried


def _name(event: Event) -> str:
    if isinstance(event, Net) and not event.refused:
        return "datagram" if event.key.via == events.VIA_DATAGRAM else "connect"
    return events.KIND_NAMES[events.kind_of(event)]


def _errno(number: int) -> str:
    return os.strerror(number) if number else "no error"
