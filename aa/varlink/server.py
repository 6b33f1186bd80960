"""A Varlink server on asyncio: who is calling is the kernel's answer, and every connection is bounded.

A method is a function of one `Call`. It returns the reply's parameters, or an
awaitable of them, or (for a call with `more`) an async iterator of them. It may
raise `VarlinkError`. Calls of one connection are answered in order.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import inspect
import logging
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aa import cgroup
from aa.varlink.codec import Framer, ProtocolError, VarlinkError, decode, encode
from aa.varlink.idl import Interface, load_interface

Json = Any
Reply = Mapping[str, Json]
Method = Callable[["Call"], Reply | Awaitable[Reply] | AsyncIterator[Reply]]

MAX_CONNECTIONS = 1024
"""Open connections of one listener; a further one is closed at once."""
MAX_CONNECTIONS_PER_UID = 256
"""Of these, from one user: one user cannot use up the listener of all."""
MAX_QUEUED_CALLS = 256
"""Calls of one connection that wait for an earlier one; then reading stops."""
MAX_UNSENT = 8 << 20
"""Bytes that a peer may leave unread before its connection is closed."""
READ_BYTES = 1 << 16
MAX_FDS = 16
"""Descriptors in flight on one connection."""
CALLS_PER_TURN = 16
"""Calls of one connection that are answered before all others have their turn."""
UNSENT_BEFORE_MORE = 64 << 10
"""Bytes of replies that may wait for their reader while its next call is answered."""
BYTES_PER_CALL = 4096
"""A longer message counts as so many more calls."""
PAUSE_SECONDS = 0.05
"""How long a connection rests whose listener is over its rate."""
ACCEPT_PAUSE_SECONDS = 0.1
"""How long accepting rests when the process is out of descriptors."""

_CLOEXEC, _TRUNCATED = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)
SO_PEERPIDFD = 77  # linux/include/uapi/asm-generic/socket.h, since 6.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection, as the kernel tells it."""

    pid: int
    uid: int
    gid: int
    cgroup: str | None  # below the cgroup2 root; None when it could not be read

    @property
    def governed(self) -> bool:
        return cgroup.is_governed(self.cgroup)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one listener spends on its peers. Over the rate they wait, and the others do not."""

    connections: int = MAX_CONNECTIONS
    connections_per_uid: int = MAX_CONNECTIONS_PER_UID
    fds: int = 0
    calls_per_second: float = math.inf


class Rate:
    """A bucket of one second's calls."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._left = per_second
        self._at = time.monotonic()

    def take(self, size: int) -> bool:
        """Whether a message of this size may be answered now."""
        if self._per_second == math.inf:
            return True
        now = time.monotonic()
        gained = (now - self._at) * self._per_second
        self._left, self._at = min(self._per_second, self._left + gained), now
        if self._left <= 0:
            return False
        self._left -= 1 + size // BYTES_PER_CALL
        return True


@dataclass(slots=True)
class Call:
    """One call: its parameters are checked against the interface already."""

    method: str
    parameters: dict[str, Json]
    more: bool
    peer: Peer
    fds: list[int] = field(default_factory=list)
    """Descriptors that came with the connection so far; the method that takes one out owns it."""


class Service:
    """The interfaces that a server offers, with `org.varlink.service` among them."""

    def __init__(self, product: str, version: str) -> None:
        self._about = {
            "vendor": "Agent Assembly",
            "product": product,
            "version": version,
            "url": "",
        }
        self.interfaces: dict[str, Interface] = {}
        self._methods: dict[str, tuple[Interface, str, Method]] = {}
        self.add(
            "org.varlink.service",
            {"GetInfo": self._get_info, "GetInterfaceDescription": self._get_description},
        )

    def add(self, name: str, methods: Mapping[str, Method]) -> None:
        """Offers a shipped interface. Every method of it must be given, and no other."""
        interface = load_interface(name)
        if set(methods) != set(interface.methods):
            raise ValueError(f"{name}: {sorted(set(methods) ^ set(interface.methods))}")
        self.interfaces[name] = interface
        for method, function in methods.items():
            self._methods[f"{name}.{method}"] = (interface, method, function)

    def find(self, call: dict[str, Json]) -> tuple[Method, dict[str, Json]]:
        """The function for a call and its checked parameters. Raises `VarlinkError`."""
        full = call.get("method")
        if not isinstance(full, str):
            raise ProtocolError("a call names its method")
        parameters = call.get("parameters")
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict):
            raise VarlinkError("org.varlink.service.InvalidParameter", {"parameter": "parameters"})
        known = self._methods.get(full)
        if known is None:
            interface_name, _, method = full.rpartition(".")
            if interface_name in self.interfaces:
                raise VarlinkError("org.varlink.service.MethodNotFound", {"method": method})
            raise VarlinkError(
                "org.varlink.service.InterfaceNotFound", {"interface": interface_name}
            )
        interface, method, function = known
        wrong = interface.wrong_parameter(method, parameters)
        if wrong is not None:
            raise VarlinkError("org.varlink.service.InvalidParameter", {"parameter": wrong})
        return function, parameters

    def _get_info(self, call: Call) -> Reply:
        return {**self._about, "interfaces": sorted(self.interfaces)}

    def _get_description(self, call: Call) -> Reply:
        name = call.parameters["interface"]
        if name not in self.interfaces:
            raise VarlinkError("org.varlink.service.InterfaceNotFound", {"interface": name})
        return {"description": self.interfaces[name].description}


def peer_of(sock: socket.socket) -> Peer:
    """Who connected `sock`, read while a descriptor holds the pid where the kernel offers one."""
    pid, uid, gid = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    path = cgroup.of_process(pid)
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        return Peer(pid, uid, gid, path)
    try:
        gone = bool(select.select([pidfd], [], [], 0)[0])
    finally:
        os.close(pidfd)
    return Peer(pid, uid, gid, None if gone else path)


Admission = Callable[[Peer], str | None]
"""Says why a peer may not use a listener, or None."""


class Server:
    """One listening socket. `admit` refuses peers with a reason before they can call anything."""

    def __init__(
        self,
        sock: socket.socket,
        service: Service,
        *,
        admit: Admission = lambda peer: None,
        limits: Limits = Limits(),
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.service = service
        self._admit = admit
        self._limits = limits
        self._rate = Rate(limits.calls_per_second)
        self._closed = False
        self._connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._accept)

    @classmethod
    def at(
        cls,
        path: str | os.PathLike[str],
        service: Service,
        *,
        mode: int = 0o600,
        admit: Admission = lambda peer: None,
        limits: Limits = Limits(),
    ) -> Server:
        """Listens at a path, in place of whatever socket was there before."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        sock.listen(128)
        return cls(sock, service, admit=admit, limits=limits)

    def close(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        for _ in range(64):  # leave the loop to others now and then
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:  # the peer left already
                continue
            except OSError as e:  # out of descriptors: asking again at once would not help
                log.warning("accept: %s", e)
                self._loop.remove_reader(self._sock)
                self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume)
                return
            sock.setblocking(False)
            try:
                peer = peer_of(sock)
            except OSError:
                sock.close()
                continue
            if self._crowded(peer):
                log.warning("too many connections, refusing pid %d uid %d", peer.pid, peer.uid)
                sock.close()
                continue
            refused = self._admit(peer)
            self._connections.add(
                Connection(
                    sock,
                    self.service,
                    peer,
                    refused,
                    self._connections.discard,
                    rate=self._rate,
                    fds=self._limits.fds,
                )
            )

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock, self._accept)

    def _crowded(self, peer: Peer) -> bool:
        if len(self._connections) >= self._limits.connections:
            return True
        same = sum(1 for c in self._connections if c.peer.uid == peer.uid)
        return same >= self._limits.connections_per_uid


class Connection:
    """One peer: reads calls, runs them in order, sends replies."""

    def __init__(
        self,
        sock: socket.socket,
        service: Service,
        peer: Peer,
        refused: str | None,
        on_close: Callable[[Connection], None],
        *,
        rate: Rate,
        fds: int,
    ) -> None:
        self.peer = peer
        self._sock = sock
        self._service = service
        self._refused = refused
        self._on_close = on_close
        self._rate = rate
        self._most_fds = fds
        self._room = socket.CMSG_SPACE(fds * array.array("i").itemsize)
        self._later: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._framer = Framer()
        self._calls: deque[bytes] = deque()
        self._fds: list[int] = []
        self._unsent = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._reading = True
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._task:
            self._task.cancel()
        if self._later:
            self._later.cancel()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._sock.close()
        self._on_close(self)

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(READ_BYTES, self._room, _CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if ancillary:
            self._keep_fds(ancillary)
        if flags & _TRUNCATED or len(self._fds) > self._most_fds or not data:
            self.close()
            return
        try:
            calls = self._framer.feed(data)
        except ProtocolError as e:
            log.info("pid %d: %s", self.peer.pid, e)
            self.close()
            return
        waits = self._calls or self._task or self._later or self._unsent
        if len(calls) == 1 and not waits and self._rate.take(len(calls[0])):
            self._answer(calls[0])  # of a client that waits for each answer, as nearly all do
            return
        self._calls.extend(calls)
        self._serve()

    def _keep_fds(self, ancillary: Iterable[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)

    def _serve(self) -> None:
        """Answers what waits, until a call needs time; then its task goes on from there.

        It also stops for a peer that does not read, for the others' turn, and at the rate.
        """
        turn = 0
        while self._calls and self._task is None and not self._closed and not self._later:
            if len(self._unsent) > UNSENT_BEFORE_MORE:
                break  # `_writable` goes on
            if turn >= CALLS_PER_TURN:
                self._later = self._loop.call_soon(self._go_on)
            elif not self._rate.take(len(self._calls[0])):
                self._later = self._loop.call_later(PAUSE_SECONDS, self._go_on)
            else:
                turn += 1
                self._answer(self._calls.popleft())
        if self._closed:
            return
        if self._reading and len(self._calls) >= MAX_QUEUED_CALLS:
            self._reading = False
            self._loop.remove_reader(self._sock)
        elif not self._reading and len(self._calls) < MAX_QUEUED_CALLS:
            self._reading = True
            self._loop.add_reader(self._sock, self._readable)

    def _go_on(self) -> None:
        self._later = None
        self._serve()

    def _answer(self, message: bytes) -> None:
        oneway = False
        try:
            raw = decode(message)
            oneway = raw.get("oneway") is True
            if self._refused is not None:
                raise VarlinkError("io.agentassembly.PermissionDenied", {"reason": self._refused})
            function, parameters = self._service.find(raw)
            more = raw.get("more") is True
            call = Call(str(raw["method"]), parameters, more, self.peer, self._fds)
            result = function(call)
        except ProtocolError as e:
            log.info("pid %d: %s", self.peer.pid, e)
            self.close()
            return
        except Exception as e:  # the rim: nothing a peer sends may end the service
            self._send_error(e, oneway=oneway)
            if self._refused is not None:
                self.close()
            return
        if type(result) is dict:
            if not oneway:
                self.send({"parameters": result})
        elif inspect.isawaitable(result):
            self._task = self._loop.create_task(self._finish(result, oneway))
        elif isinstance(result, AsyncIterator):
            self._task = self._loop.create_task(self._stream(result, more))
        elif not oneway:
            self.send({"parameters": result})

    async def _finish(self, result: Awaitable[Reply], oneway: bool) -> None:
        try:
            reply = await result
        except asyncio.CancelledError:
            raise
        except Exception as e:
            self._send_error(e, oneway=oneway)
        else:
            if not oneway:
                self.send({"parameters": reply})
        self._next()

    async def _stream(self, replies: AsyncIterator[Reply], more: bool) -> None:
        try:
            async for reply in replies:
                if not more:
                    self.send({"parameters": reply})
                    break
                self.send({"parameters": reply, "continues": True})
            else:
                self.send({"parameters": {}})
        except asyncio.CancelledError:
            raise
        except Exception as e:
            self._send_error(e, oneway=False)
        finally:
            close = getattr(replies, "aclose", None)
            if close is not None:
                with contextlib.suppress(RuntimeError):
                    await close()
        self._next()

    def _next(self) -> None:
        self._task = None
        if not self._closed:
            self._serve()

    def _send_error(self, error: Exception, *, oneway: bool) -> None:
        if not isinstance(error, VarlinkError):
            log.error("pid %d: %r", self.peer.pid, error, exc_info=error)
            error = VarlinkError("io.agentassembly.InternalError", {"reason": str(error)})
        if not oneway:
            self.send({"error": error.error, "parameters": error.parameters})

    def send(self, message: Mapping[str, Json]) -> None:
        if self._closed:
            return
        try:
            data = encode(message)
        except (ProtocolError, ValueError) as e:
            data = encode(
                {"error": "io.agentassembly.InternalError", "parameters": {"reason": str(e)}}
            )
        if not self._unsent:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.close()
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._sock, self._writable)
        self._unsent += data
        if len(self._unsent) > MAX_UNSENT:
            log.warning("pid %d does not read its replies, closing", self.peer.pid)
            self.close()

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._sock)
            self._serve()
