"""A hook that raises denies: each one in turn, with a real worker and a real client over loopback."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from aa.model import Report
from aa.proxy.inspect.pool import NoWorker, Pool
from aa.proxy.inspect.session import Session, Wanted, new_token
from aa.proxy.splice import Outcome
from tests.host.front_world import Gateway, certificates, decision
from tests.host.inspect_world import engine
from tests.unit.ca_world import World as Authority

HOOKS = [
    "client_connected",
    "socks5_auth",
    "next_layer",
    "tls_clienthello",
    "tls_start_client",
    "tls_start_server",
    "tls_established_server",
    "requestheaders",
    "request",
    "responseheaders",
    "response",
]
FAULTY = Path(__file__).with_name("faulty_worker.py")


class Place:
    """A gateway that allows everything, an authority, and an origin that keeps what it read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory / "authority")
        self.ca, leaf = certificates(directory, ("allowed.test",))
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(leaf)
        self.gateway = Gateway(directory / "enforce")
        self.gateway.rules["allowed.test"] = decision()
        self.gateway.start()
        self.read = b""
        self.reports: list[Report] = []

    def settings(self, fault: str) -> dict[str, object]:
        return {
            "connect_seconds": 3.0,
            "peek_seconds": 3.0,
            "decide_seconds": 3.0,
            "idle_seconds": 60.0,
            "max_waiting": 8,
            "max_waiting_per_run": 8,
            "ca_dir": str(self.authority.places.proxy),
            "trust_store": str(self.ca),
            "fault": fault,
        }

    def pool(self, fault: str, **how: object) -> Pool:
        given = {"engine": engine(), "program": FAULTY, **how}
        return Pool(
            1,
            report=self.reports.append,
            enforce=self.directory / "enforce",
            settings=lambda: self.settings(fault),
            **given,  # type: ignore[arg-type]
        )

    async def origin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.read += await reader.readuntil(b"\r\n\r\n")
        self.read += await reader.readexactly(6)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "authority").mkdir()
    made = Place(tmp_path)
    yield made
    made.gateway.close()


async def exchange(place: Place, pool: Pool) -> tuple[bytes, Outcome | None]:
    """One HTTPS request through a worker: what the client got, and how it ended."""
    origin = await asyncio.start_server(place.origin, "127.0.0.1", 0, ssl=place.tls)
    port = origin.sockets[0].getsockname()[1]
    outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    async def inspected() -> None:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        id_, secret = new_token()
        session = Session(
            id=id_,
            secret=secret,
            run="r",
            uid=0,
            host="allowed.test",
            port=port,
            addresses=(ipaddress.ip_address("127.0.0.1"),),
            protocol="tls",
            wanted=Wanted(),
        )
        try:
            way = await pool.hand_over(session, b"", sock)
            outcome.set_result(await way.run())
            way.close()
        except NoWorker:
            outcome.cancel()
        finally:
            sock.close()

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    serving = asyncio.create_task(inspected())
    got = b""
    try:
        context = ssl.create_default_context(cafile=str(place.authority.places.root_certificate))
        async with asyncio.timeout(15):
            reader, writer = await asyncio.open_connection(
                *listener.getsockname()[:2], ssl=context, server_hostname="allowed.test"
            )
            host = f"allowed.test:{port}"
            writer.write(f"POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 6\r\n".encode())
            writer.write(b"Connection: close\r\n\r\nsecret")
            got = await reader.read()
            writer.close()
    except (OSError, EOFError):
        pass
    finally:
        await asyncio.wait([serving], timeout=10)
        listener.close()
        origin.close()
    return got, None if outcome.cancelled() or not outcome.done() else outcome.result()


def through(place: Place, fault: str) -> tuple[bytes, Outcome | None]:
    async def live() -> tuple[bytes, Outcome | None]:
        pool = place.pool(fault)
        keeping = asyncio.create_task(pool.keep())
        try:
            return await exchange(place, pool)
        finally:
            await pool.close()
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    return asyncio.run(live())


def test_without_a_fault_the_same_request_passes(place: Place) -> None:
    got, outcome = through(place, "")
    assert got.startswith(b"HTTP/1.1 200 OK\r\n") and got.endswith(b"hello")
    assert b"secret" in place.read and outcome is not None and outcome.ended == "closed"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_lets_nothing_through(place: Place, hook: str) -> None:
    got, _ = through(place, hook)
    assert b"hello" not in got or hook == "response"
    if hook not in ("request", "responseheaders", "response"):
        assert b"secret" not in place.read  # those come when the body is on its way
    if hook == "requestheaders":
        assert got.startswith(b"HTTP/1.1 403 Forbidden\r\n") and b"inspection failed" in got
    if hook not in ("client_connected", "socks5_auth"):
        refused = [r for r in place.gateway.reports if r["type"] == "refusal"]
        assert [r["rule"] for r in refused][:1] == ["<inspect-error>"], hook


def test_a_worker_without_its_engine_serves_nobody(place: Place, tmp_path: Path) -> None:
    (tmp_path / "empty" / "mitmproxy").mkdir(parents=True)

    async def live() -> str:
        pool = place.pool("", engine=tmp_path / "empty")
        keeping = asyncio.create_task(pool.keep())
        try:
            async with asyncio.timeout(20):
                while not pool.problem():
                    await asyncio.sleep(0.05)
            got, outcome = await exchange(place, pool)
            assert got == b"" and outcome is None
            return pool.problem()
        finally:
            await pool.close()
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    problem = asyncio.run(live())
    assert problem.startswith("inspection does not work: ") and place.read == b""


def test_a_worker_that_is_stuck_is_replaced(place: Place) -> None:
    async def live() -> tuple[bytes, Outcome | None]:
        pool = place.pool("", silent_seconds=1.5)
        keeping = asyncio.create_task(pool.keep())
        try:
            async with asyncio.timeout(20):
                while not pool.status()["pids"]:
                    await asyncio.sleep(0.05)
                (pid,) = pool.status()["pids"]
                os.kill(pid, signal.SIGSTOP)
                while pool.status()["pids"] in ([], [pid]):
                    await asyncio.sleep(0.05)
            return await exchange(place, pool)
        finally:
            await pool.close()
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    got, _ = asyncio.run(live())
    assert got.endswith(b"hello")
    assert any("stuck" in r.reason for r in place.reports)
