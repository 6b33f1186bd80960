"""Calls of strangers to a real service through a real connection: each has an answer of its interface's
types, none is an internal error, and the service answers the next one as if nothing had been."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any

from aa.varlink import Call, Peer, Service
from aa.varlink.codec import ProtocolError, decode, encode
from aa.varlink.idl import Type
from aa.varlink.server import Connection, Rate

CALLS_LIMIT = 32
"""Of one input."""
WAITING_SECONDS = 0.02
"""For what may rightly take long: it is given up then."""
QUIET_TURNS = 50
"""Of the loop without a word, after which nothing more is expected."""
GET_INFO = encode({"method": "org.varlink.service.GetInfo"})


def messages(calls: Any) -> list[bytes]:
    """What a client sends for these calls; a text is sent as it is."""
    sent = []
    for call in calls[:CALLS_LIMIT] if isinstance(calls, list) else ():
        if isinstance(call, str):
            sent.append(call.encode("utf-8", "surrogatepass") + b"\0")
        else:
            sent.append(json.dumps(call).encode() + b"\0")
    return sent


async def exchange(
    service: Service, peer: Peer, sent: Sequence[bytes], fds: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The replies to these messages, checked; and the service is alive behind them."""
    replies = await _connected(service, peer, b"".join(sent), fds)
    for reply in replies:
        _check(service, reply)
    again = await _connected(service, peer, GET_INFO, ())
    assert len(again) == 1 and "error" not in again[0], again
    return replies


async def _connected(
    service: Service, peer: Peer, data: bytes, fds: Sequence[int]
) -> list[dict[str, Any]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    closed = asyncio.Event()
    connection = Connection(
        theirs, service, peer, None, lambda _: closed.set(), rate=Rate(float("inf")), fds=len(fds)
    )
    received = bytearray()
    with ours:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):
            count = ours.sendmsg([data], rights)
            data = data[count:]
        quiet = 0
        while quiet < QUIET_TURNS and not closed.is_set():
            await asyncio.sleep(0)
            count = 0
            with contextlib.suppress(OSError):
                count = ours.send(data) if data else 0
            data = data[count:]
            quiet = 0 if _received(ours, received) or count else quiet + 1
        if not closed.is_set() and not _idle(connection):
            await asyncio.sleep(WAITING_SECONDS)
        _received(ours, received)
        connection.close()
        _received(ours, received)
    for _ in range(3):
        await asyncio.sleep(0)  # what was cancelled ends
    return [decode(message) for message in bytes(received).split(b"\0")[:-1]]


def _idle(connection: Connection) -> bool:
    return connection._task is None and not connection._calls and not connection._later


def _received(sock: socket.socket, received: bytearray) -> bool:
    """Whether there was something."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        while data := sock.recv(1 << 16):
            received += data
            return True
    return False


def _check(service: Service, reply: dict[str, Any]) -> None:
    assert set(reply) <= {"parameters", "continues", "error"}, reply
    parameters = reply["parameters"]
    error = reply.get("error")
    if error is None:
        assert isinstance(parameters, dict)
        return
    assert error != "io.agentassembly.InternalError", parameters
    interface, _, name = error.rpartition(".")
    known = service.interfaces.get(interface)
    if known is not None:
        assert known.wrong_field(known.errors[name], parameters) is None, reply


def checked(service: Service) -> Service:
    """The same service, with every reply compared with what its interface says."""
    for full, (interface, method, function) in list(service._methods.items()):
        service._methods[full] = (interface, method, _compared(interface, method, function))
    return service


def _compared(interface: Any, method: str, function: Any) -> Any:
    kind: Type = interface.methods[method].reply

    def compare(reply: Any) -> Any:
        wrong = interface.wrong_field(kind, decode(encode(reply)[:-1]))
        assert wrong is None, f"{interface.name}.{method}: {wrong} of {reply}"
        return reply

    async def later(result: Any) -> Any:
        return compare(await result)

    async def several(result: Any) -> Any:
        async for reply in result:
            yield compare(reply)

    def call(given: Call) -> Any:
        result = function(given)
        if asyncio.iscoroutine(result):
            return later(result)
        return several(result) if hasattr(result, "__aiter__") else compare(result)

    return call


__all__ = ["ProtocolError", "checked", "exchange", "messages"]
