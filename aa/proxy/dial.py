"""Resolves names as the host does, and connects to addresses that were checked and to no others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from aa.proxy.hostdns import HostNames

RESOLVER_THREADS = 32
RESOLVING_PER_RUN = 8
"""Names that one run may have in resolution: one run must not hold every thread."""
RESOLVE_SECONDS = 5.0
RESOLVED_FOR_SECONDS = 2.0
"""How long an answer serves again, so that a burst of connections asks the resolver once."""
CACHE_LIMIT = 1024
ADDRESSES_LIMIT = 32
"""Addresses of a name that are checked and may be dialled; further ones are left out."""
NEXT_ATTEMPT_SECONDS = 0.25
"""How long one address may take before the next is tried beside it (RFC 8305)."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str], Sequence[str]]


class UpstreamFailed(Exception):
    """The name has no address, or none could be reached.

    `error` is a proxy error type of RFC 9209, `status` the HTTP status for it.
    """

    def __init__(self, what: str, *, error: str, status: int = 502) -> None:
        self.error = error
        self.status = status
        super().__init__(what)


def address_of(text: str) -> Address:
    """An address without its scope; v4 in v6 clothes becomes v4. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def host_lookup(name: str) -> Sequence[str]:
    """The host's resolver's answer in its own order (RFC 6724). Blocks. Raises `OSError`.

    The dot at the end keeps the host's search list out of names that have dots: the decided
    name is asked for, and never `name.of.some.search.domain`.
    """
    asked = f"{name}." if "." in name else name
    found = socket.getaddrinfo(asked.encode("ascii"), None, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Resolver:
    """Name to addresses: the hosts file, then the host's resolver in a bounded pool of threads."""

    def __init__(self, *, lookup: Lookup = host_lookup, names: HostNames | None = None) -> None:
        self._lookup = lookup
        self._names = names or HostNames()
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolve")
        self._waiting: dict[str, asyncio.Future[Sequence[str]]] = {}
        self._per_run: Counter[str] = Counter()
        self._answers: OrderedDict[str, tuple[float, tuple[Address, ...]]] = OrderedDict()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def known(self, name: str) -> tuple[Address, ...]:
        """The addresses that are known here, so that nobody would be asked; () when none are."""
        listed = self._names.addresses(name)
        if listed:
            return _unique(listed)
        until, addresses = self._answers.get(name, (0.0, ()))
        return addresses if until > asyncio.get_running_loop().time() else ()

    async def resolve(self, name: str, *, run: str = "") -> tuple[Address, ...]:
        """At least one address and at most `ADDRESSES_LIMIT`. Raises `UpstreamFailed`."""
        known = self.known(name)
        if known:
            return known
        addresses = _unique(address_of(text) for text in await self._ask(name, run))
        if not addresses:
            raise UpstreamFailed(f"{name} has no address", error="dns_error")
        until = asyncio.get_running_loop().time() + RESOLVED_FOR_SECONDS
        self._answers[name] = (until, addresses)
        self._answers.move_to_end(name)
        if len(self._answers) > CACHE_LIMIT:
            self._answers.popitem(last=False)
        return addresses

    async def _ask(self, name: str, run: str) -> Sequence[str]:
        """One lookup per name at a time. A thread that hangs is left behind, not waited for."""
        if self._per_run[run] >= RESOLVING_PER_RUN:
            raise UpstreamFailed(
                f"this run is resolving {RESOLVING_PER_RUN} names already", error="dns_error"
            )
        waiting = self._waiting.get(name)
        if waiting is None:
            waiting = asyncio.get_running_loop().run_in_executor(self._threads, self._lookup, name)
            self._waiting[name] = waiting
            waiting.add_done_callback(lambda done: self._forget(name, done))
        self._per_run[run] += 1
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise UpstreamFailed(
                f"the host's resolver did not answer for {name} within {RESOLVE_SECONDS:g} s",
                error="dns_timeout",
                status=504,
            ) from None
        except (OSError, UnicodeError) as e:
            why = e.strerror if isinstance(e, OSError) else str(e)
            raise UpstreamFailed(f"{name} does not resolve: {why}", error="dns_error") from None
        finally:
            self._per_run[run] -= 1
            if not self._per_run[run]:
                del self._per_run[run]

    def _forget(self, name: str, done: asyncio.Future[Sequence[str]]) -> None:
        self._waiting.pop(name, None)
        if not done.cancelled():
            done.exception()  # taken note of even when nobody waits any more


def _unique(addresses: Iterable[Address]) -> tuple[Address, ...]:
    return tuple(dict.fromkeys(addresses))[:ADDRESSES_LIMIT]


def in_turn(addresses: Sequence[Address]) -> list[Address]:
    """The same addresses with the families taking turns, the first one's family first."""
    if not addresses:
        return []
    first = [a for a in addresses if a.version == addresses[0].version]
    second = [a for a in addresses if a.version != addresses[0].version]
    order: list[Address] = []
    for i in range(max(len(first), len(second))):
        order += first[i : i + 1] + second[i : i + 1]
    return order


async def dial(
    addresses: Sequence[Address], port: int, *, seconds: float, scope: int = 0
) -> tuple[socket.socket, Address]:
    """A connected socket to the first of `addresses` that answers. Raises `UpstreamFailed`.

    `scope` is the interface index of a link-local v6 address.
    """
    left = in_turn(addresses)
    attempts: dict[asyncio.Task[socket.socket], Address] = {}
    errors: dict[Address, OSError] = {}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    try:
        while left or attempts:
            if left:
                address = left.pop(0)
                attempts[loop.create_task(_connect(address, port, scope))] = address
            patience = deadline - loop.time()
            if left:
                patience = min(patience, NEXT_ATTEMPT_SECONDS)
            if patience <= 0:
                break
            done, _ = await asyncio.wait(
                attempts, timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                address = attempts.pop(task)
                error = task.exception()
                if error is None:
                    return task.result(), address
                if not isinstance(error, OSError):
                    raise error
                errors[address] = error
    finally:
        await _give_up(attempts)
    raise _failure(addresses, port, errors, seconds)


async def _connect(address: Address, port: int, scope: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        name = (str(address), port) if address.version == 4 else (str(address), port, 0, scope)
        await asyncio.get_running_loop().sock_connect(sock, name)
    except BaseException:
        sock.close()
        raise
    return sock


async def _give_up(attempts: dict[asyncio.Task[socket.socket], Address]) -> None:
    """Ends the attempts that lost, and closes one that won too late."""
    for task in attempts:
        task.cancel()
    for task in attempts:
        with contextlib.suppress(asyncio.CancelledError, OSError):
            (await task).close()


_ERRORS = {
    errno.ECONNREFUSED: "connection_refused",
    errno.ENETUNREACH: "destination_ip_unroutable",
    errno.EHOSTUNREACH: "destination_ip_unroutable",
    errno.ETIMEDOUT: "connection_timeout",
    errno.ECONNRESET: "connection_terminated",
}


def _failure(
    addresses: Sequence[Address], port: int, errors: dict[Address, OSError], seconds: float
) -> UpstreamFailed:
    if len(errors) < len(addresses):
        silent = [a for a in addresses if a not in errors]
        return UpstreamFailed(
            f"no answer from {_list(silent)} port {port} within {seconds:g} s",
            error="connection_timeout",
            status=504,
        )
    first = next(iter(errors.values()), None)
    told = "; ".join(f"{a}: {_plainly(e)}" for a, e in list(errors.items())[:4])
    known = _ERRORS.get(first.errno or 0) if first is not None else None
    return UpstreamFailed(
        f"port {port} could not be reached ({told or 'no address'})",
        error=known or "destination_unavailable",
    )


def _plainly(error: OSError) -> str:
    """asyncio puts the address into the text; the number says it better."""
    return os.strerror(error.errno) if error.errno else str(error)


def _list(addresses: Sequence[Address]) -> str:
    shown = ", ".join(str(a) for a in addresses[:4])
    return shown if len(addresses) <= 4 else f"{shown} and {len(addresses) - 4} more"
