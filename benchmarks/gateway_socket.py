"""What the gateway costs over its socket: latency beside a bare echo, decisions a second, memory, reload.

/usr/bin/python3 -m benchmarks.gateway_socket

The gateway is the real one, on one core, with its audit file and a datagram socket in journald's
place that another process reads; clients are on the other core. The echo is an asyncio Protocol that
answers every request with as many bytes as the gateway's answer has.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aa.audit.file import AuditFile
from aa.audit.journal import Journal
from aa.audit.log import AuditLog
from aa.config import Config
from aa.gateway.gateway import Gateway
from aa.gateway.interfaces import enforce_service
from aa.gateway.runs import RunRegistry
from aa.model import Action, Kind, Layer, Run
from aa.varlink import Server
from aa.varlink.codec import encode
from benchmarks.measures import Measure

RULES = 1000
RUNS = 200
CLIENTS = 8
ROUNDS = 5
"""Echo and gateway take turns; a round is so many calls."""
CALLS = 4000
THROUGHPUT_SECONDS = 4.0
RELOADS = 5
LOOK_SECONDS = 0.02
CONTEXT = multiprocessing.get_context("fork")
CORES = sorted(os.sched_getaffinity(0))


def policy_text(rules: int = RULES) -> str:
    """Mixed rules: names, suffixes, ports, addresses, tools with arguments."""
    out = [
        '[policy]\nid = "bench"\n'
        'default = { network = "deny", dns = "deny", tool = "deny" }\n\n'
        '[[rule]]\nid = "api"\neffect = "allow"\nnetwork = { hosts = ["api.example.com"] }\n'
    ]
    for n in range(rules - 1):
        match n % 5:
            case 0:
                matcher = f'network = {{ hosts = ["h{n}.example.org"], ports = [443] }}'
            case 1:
                matcher = f'network = {{ hosts = ["**.d{n}.example.net"] }}'
            case 2:
                matcher = f'tool = {{ names = ["tool_{n}"], args = {{ n = {{ gt = {n} }} }} }}'
            case 3:
                matcher = f'tool = {{ names = ["group{n}_*"] }}'
            case _:
                matcher = f'network = {{ cidrs = ["10.{n // 250}.{n % 250}.0/24"] }}'
        effect = ("allow", "deny", "ask")[n % 3]
        out.append(f'[[rule]]\nid = "r{n}"\neffect = "{effect}"\n{matcher}\n')
    return "\n".join(out)


def connect_action() -> Action:
    attributes = {
        "port": 443,
        "protocol": "tls",
        "host": "api.example.com",
        "addresses": ["93.184.216.34"],
        "original": "93.184.216.34",
        "uid": 1000,
    }
    return Action(Kind.NET_CONNECT, "api.example.com:443", attributes)


def request_bytes(run: str) -> bytes:
    parameters = {
        "run": run,
        "layer": Layer.PROXY.value,
        "action": connect_action().as_json(),
        "provisional": False,
    }
    return encode({"method": "io.agentassembly.Enforce.Decide", "parameters": parameters})


# -- the processes


def pin(core: int) -> None:
    os.sched_setaffinity(0, {CORES[core % len(CORES)]})


def open_gateway(folder: Path, journal: Path) -> Gateway:
    config = Config()
    config = replace(
        config,
        audit=replace(config.audit, file=folder / "audit.jsonl", bytes_per_second_per_run=1 << 30),
        gateway=replace(config.gateway, max_runs=RUNS + 1, decisions_per_second=10**6),
    )
    log = AuditLog(
        AuditFile(folder / "audit.jsonl", max_bytes=config.audit.max_bytes, keep=8),
        Journal(journal),
    )
    gateway = Gateway(
        config=config,
        policies=folder / "policy.d",
        registry=RunRegistry(folder / "runs.sqlite"),
        audit=log,
    )
    gateway.source.reload()
    assert not gateway.source.problems, gateway.source.problems
    return gateway


def serve_gateway(folder: Path, journal: Path, pipe: Connection) -> None:
    """A gateway with many live runs. Told "stop" it says how many records it has."""
    pin(0)

    async def live() -> None:
        gateway = open_gateway(folder, journal)
        runs = []
        for n in range(RUNS):
            run = gateway.register(Run("", "claude-code", "dev", 1000, layers=frozenset(Layer)))
            runs.append(gateway.start(run.id, f"aa.slice/x/aa-agent-{run.id}.service", 1000 + n))
        service = enforce_service(gateway, open_run=lambda _: None, close_run=lambda _: None)
        Server(listening(folder / "gateway"), service)
        gc.collect()
        gc.freeze()  # as the daemon does
        reloads: list[float] = []
        watching = asyncio.create_task(watch(gateway, reloads))
        pipe.send([run.id for run in runs])
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        loop.add_reader(pipe.fileno(), lambda: told.done() or told.set_result(None))
        await told
        watching.cancel()
        pipe.recv()
        pipe.send((gateway.audit.records, memory(os.getpid()), reloads))

    asyncio.run(live())


async def watch(gateway: Gateway, log: list[float]) -> None:
    """Reloads as the daemon does, and notes how long each took."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if gateway.source.changed:
            began = time.perf_counter()
            await gateway.source.reload_beside()
            log.append(time.perf_counter() - began)


class Echo(asyncio.Protocol):
    """Answers each message with the same bytes every time."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"\0"):
            self._transport.write(self._answer)


def serve_echo(folder: Path, answer: bytes, pipe: Connection) -> None:
    pin(0)

    async def live() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_server(lambda: Echo(answer), sock=listening(folder / "echo"))
        pipe.send(None)
        await asyncio.sleep(3600)

    asyncio.run(live())


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(64)
    return sock


def read_journal(path: Path, count: Any) -> None:
    """In journald's place: takes every datagram and counts it."""
    pin(1)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.bind(str(path))
    buffer = bytearray(1 << 18)
    while True:
        sock.recv_into(buffer)
        count.value += 1


@contextmanager
def process(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    child = CONTEXT.Process(target=function, args=arguments, daemon=True)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join(10)


# -- clients


class Caller:
    """One blocking client: sends the same request again and again and reads each answer whole."""

    def __init__(self, path: Path, request: bytes) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(30)
        self._sock.connect(str(path))
        self._request = request

    def call(self) -> bytes:
        self._sock.sendall(self._request)
        answer = self._sock.recv(65536)
        while not answer.endswith(b"\0"):
            more = self._sock.recv(65536)
            assert more, "the server left"
            answer += more
        return answer


def latencies(caller: Caller, calls: int) -> list[float]:
    """Seconds of each call."""
    clock = time.perf_counter
    out = []
    for _ in range(calls):
        began = clock()
        caller.call()
        out.append(clock() - began)
    return out


def hammer(path: Path, requests: Sequence[bytes], seconds: float) -> list[float]:
    """Clients that each wait for their answer before they ask again, on one core: the seconds of
    every call."""
    clock, times = time.perf_counter, []
    with selectors.DefaultSelector() as selector:
        asked: dict[socket.socket, float] = {}
        for request in requests:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            selector.register(sock, selectors.EVENT_READ, request)
            sock.sendall(request)
            asked[sock] = clock()
        end = clock() + seconds
        while clock() < end:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                answer = sock.recv(65536)
                assert answer.endswith(b"\0") and answer.count(b"\0") == 1
                now = clock()
                times.append(now - asked[sock])
                sock.sendall(key.data)
                asked[sock] = now
        for sock in asked:
            sock.recv(65536)
            sock.close()
    return times


def memory(pid: int) -> int:
    """Resident bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# -- the measurements


@dataclass(frozen=True)
class Stage:
    folder: Path
    gateway: Connection
    runs: list[str]
    journaled: Any


@contextmanager
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="aa-bench-") as name:
        folder = Path(name)
        (folder / "policy.d").mkdir()
        (folder / "policy.d" / "50-bench.toml").write_text(policy_text())
        journaled = CONTEXT.Value("Q", 0, lock=False)
        ours, theirs = CONTEXT.Pipe()
        journal = folder / "journal"
        with process(read_journal, journal, journaled):
            while not journal.exists():
                time.sleep(0.01)
            with process(serve_gateway, folder, journal, theirs):
                runs = ours.recv()
                yield Stage(folder, ours, runs, journaled)


def one_client(s: Stage) -> Iterator[Measure]:
    request = request_bytes(s.runs[0])
    answer = Caller(s.folder / "gateway", request).call()
    assert b'"effect":"allow"' in answer, answer
    ours, theirs = CONTEXT.Pipe()
    with process(serve_echo, s.folder, answer, theirs):
        ours.recv()
        callers = {n: Caller(s.folder / n, request) for n in ("echo", "gateway")}
        times: dict[str, list[float]] = {"echo": [], "gateway": []}
        for caller in callers.values():
            latencies(caller, CALLS // 4)
        for _ in range(ROUNDS):
            for name, caller in callers.items():
                times[name].append(statistics.median(latencies(caller, CALLS)) * 1e6)
    echo, gateway = (statistics.median(times[n]) for n in ("echo", "gateway"))
    ratios = [g / e for g, e in zip(times["gateway"], times["echo"], strict=True)]
    yield Measure(
        "decision over the socket, one client",
        f"{gateway:.0f} µs",
        f"{statistics.median(ratios):.2f} times an echo of the same bytes ({echo:.0f} µs); "
        f"medians of {ROUNDS} rounds of {CALLS}",
    )


def many_clients(s: Stage) -> Iterator[Measure]:
    requests = [request_bytes(run) for run in s.runs[:CLIENTS]]
    times = hammer(s.folder / "gateway", requests, THROUGHPUT_SECONDS)
    yield Measure(
        f"decisions a second, {CLIENTS} clients, gateway on one core",
        f"{len(times) / THROUGHPUT_SECONDS:.0f}",
        f"median {statistics.median(times) * 1e3:.2f} ms, 99.9% within "
        f"{percentile(times, 0.999) * 1e3:.2f} ms, longest {max(times) * 1e3:.2f} ms",
    )


def longest_answers(s: Stage) -> list[float]:
    """Seconds of the longest answer that one client waited for, around each of some reloads."""
    caller = Caller(s.folder / "gateway", request_bytes(s.runs[0]))
    file = s.folder / "policy.d" / "50-bench.toml"
    longest = []
    for n in range(RELOADS):
        new = file.with_suffix(".new")
        new.write_text(policy_text().replace('id = "bench"', f'id = "bench"\nrevision = {n}', 1))
        new.rename(file)
        waits, answer, began = [0.0], b"", time.perf_counter()
        while f"bench@{n}".encode() not in answer:
            before = time.perf_counter()
            answer = caller.call()
            waits.append(time.perf_counter() - before)
            assert before - began < 30, "the new policy does not come"
        longest.append(max(waits))
    return longest


def end(s: Stage, longest: list[float]) -> Iterator[Measure]:
    s.gateway.send("stop")
    records, rss, reloads = s.gateway.recv()
    time.sleep(0.5)
    lines = sum(file.read_bytes().count(b"\n") for file in s.folder.glob("audit.jsonl*"))
    yield Measure(
        f"reload of {RULES} rules",
        f"{statistics.median(reloads) * 1e3:.0f} ms",
        f"of {len(reloads)}, while a client asks on; the longest answer around each took "
        f"{statistics.median(longest) * 1e3:.1f} ms (median), {max(longest) * 1e3:.1f} ms (all)",
    )
    yield Measure(
        "records of all these decisions",
        f"{records}",
        f"{records - lines} are missing in the file, {records - s.journaled.value} in the journal",
    )
    yield Measure(
        f"memory of the gateway, {RULES} rules, {RUNS} live runs", f"{rss / 2**20:.1f} MiB", "RSS"
    )


def measure() -> Iterator[Measure]:
    before = os.sched_getaffinity(0)
    pin(1)
    try:
        yield from _measure()
    finally:
        os.sched_setaffinity(0, before)


def _measure() -> Iterator[Measure]:
    with stage() as s:
        yield from one_client(s)
        yield from many_clients(s)
        yield from end(s, longest_answers(s))


def main() -> None:
    for found in measure():
        print(f"{found.name}: {found.value} ({found.how})", flush=True)


if __name__ == "__main__":
    main()
