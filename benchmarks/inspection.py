"""What inspection costs, beside stock mitmdump of the same version and a direct connection in one run.

    python3 -m benchmarks.inspection

Client, proxy and origin are processes of this machine; the origin is in another network namespace.
Ours is the real front and one worker behind the redirect, with a stand-in gateway that allows at
once (so each request is still asked for over the socket, and recorded). mitmdump runs as it comes,
as an HTTP proxy; for the body it is told to stream. All verify the origin, whose key is P-256.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measures import Measure
from tests.host.front_world import PEER4, RUN, decision, world
from tests.host.inspect_world import InspectingWorld, Origin, inspect
from tests.host.redirect_lab import REPOSITORY, Lab, wait_for

PORT, STOCK_PORT = 9443, 8080
ROUNDS = 5
CONNECTIONS = 60  # of one round
REQUESTS = 600  # of one round
STREAMS = 10
BODY = 1 << 30
MITMDUMP = REPOSITORY / "build/inspect/mitmdump"
PYTHON = "/usr/bin/python3"

ORIGIN = """
import asyncio, ssl, sys
leaf, port = sys.argv[1], int(sys.argv[2])
block = bytes(1 << 16)
async def serve(r, w):
    try:
        while head := await r.readuntil(b"\\r\\n\\r\\n"):
            path = head.split()[1]
            if path == b"/events":
                w.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\n"
                        b"Transfer-Encoding: chunked\\r\\n\\r\\n9\\r\\ndata: 1\\n\\n\\r\\n")
                await w.drain(); await asyncio.sleep(0.5)
                w.write(b"0\\r\\n\\r\\n")
            elif path.startswith(b"/bytes/"):
                left = int(path[7:])
                w.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % left)
                while left > 0:
                    w.write(block[:min(left, 1 << 16)]); left -= 1 << 16
                    await w.drain()
            else:
                w.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello")
            await w.drain()
    except (EOFError, OSError): pass
    w.close()
async def main():
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain(leaf)
    s = await asyncio.start_server(serve, "0.0.0.0", port, ssl=c)
    print("ready", flush=True)
    await s.serve_forever()
asyncio.run(main())
"""

CLIENT = """
import json, socket, ssl, statistics, sys, time
kind, address, port, ca, proxy, count = sys.argv[1:7]
count = int(count)
c = ssl.create_default_context(cafile=ca)
def connected():
    if proxy == "none":
        s = socket.create_connection((address, int(port)))
    else:
        s = socket.create_connection(("127.0.0.1", int(proxy)))
        s.sendall(f"CONNECT allowed.test:{port} HTTP/1.1\\r\\nHost: allowed.test:{port}\\r\\n\\r\\n".encode())
        while b"\\r\\n\\r\\n" not in s.recv(4096): pass
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return c.wrap_socket(s, server_hostname="allowed.test")
def ask(s, path, end):
    s.sendall(f"GET {path} HTTP/1.1\\r\\nHost: allowed.test:{port}\\r\\n\\r\\n".encode())
    got = b""
    while end not in got:
        part = s.recv(65536)
        if not part: raise EOFError(got)
        got += part
now = time.perf_counter
if kind == "connections":
    times = []
    for _ in range(count):
        began = now(); s = connected(); ask(s, "/", b"hello"); times.append(now() - began); s.close()
    print(statistics.median(times) * 1000)
elif kind == "requests":
    s = connected(); ask(s, "/", b"hello")
    began = now()
    for _ in range(count): ask(s, "/", b"hello")
    print(count / (now() - began))
elif kind == "events":
    times = []
    for _ in range(count):
        s = connected(); ask(s, "/", b"hello")
        began = now(); ask(s, "/events", b"data: 1"); times.append(now() - began); s.close()
    print(statistics.median(times) * 1000)
elif kind == "body":
    s = connected()
    s.sendall(f"GET /bytes/{count} HTTP/1.1\\r\\nHost: allowed.test:{port}\\r\\n\\r\\n".encode())
    began, left, buffer = now(), count, bytearray(1 << 16)
    while left > 0:
        n = s.recv_into(buffer)
        if not n: raise EOFError(left)
        left -= n
    print(count / (now() - began) / 1e6)
"""

STOCK = """
import sys
sys.path.insert(0, sys.argv[1])
from mitmproxy.tools.main import mitmdump
mitmdump(sys.argv[2:])
"""


class Bench(InspectingWorld):
    """The origin is a process of its own."""

    class peer_type(Origin):  # noqa: N801
        def served(self, tls: Any) -> Any:
            return ()

    def origin(self) -> None:
        process = self.lab.start_peer(
            PYTHON, "-c", ORIGIN, str(self.directory / "leaf.pem"), str(PORT)
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def client(self, kind: str, count: int, *, how: str) -> float:
        """One run of the client: `direct`, `ours` or `stock`."""
        trusted = {"direct": self.ca, "ours": self.root, "stock": self.directory / "stock-ca.pem"}
        proxy = str(STOCK_PORT) if how == "stock" else "none"
        arguments = [kind, PEER4, str(PORT), str(trusted[how]), proxy, str(count)]
        command = [PYTHON, "-c", CLIENT, *arguments]
        governed = how == "ours"
        done = self.lab.governed(RUN, *command) if governed else self.lab.run(*command)
        return float(done.stdout)


@contextlib.contextmanager
def stock(w: Bench, *options: str) -> Iterator[int]:
    """mitmdump; its pid."""
    home = w.directory / "stock"
    home.mkdir(exist_ok=True)
    process = w.lab.start(
        PYTHON,
        "-c",
        STOCK,
        str(MITMDUMP),
        "--quiet",
        f"--listen-port={STOCK_PORT}",
        "--set",
        f"confdir={home}",
        "--set",
        f"ssl_verify_upstream_trusted_ca={w.ca}",
        *options,
    )
    try:
        authority = home / "mitmproxy-ca-cert.pem"
        assert wait_for(lambda: authority.exists() and _listens(w.lab), 30)
        (w.directory / "stock-ca.pem").write_bytes(authority.read_bytes())
        yield _pid(process)
    finally:
        process.kill()
        process.wait(10)


def _listens(lab: Lab) -> bool:
    return f":{STOCK_PORT} " in lab.run("ss", "-ltn").stdout


def _pid(process: subprocess.Popen[str]) -> int:
    """nsenter becomes the program it starts."""
    return process.pid


def peak_megabytes(pid: int, act: Callable[[], object]) -> float:
    """The most that a process has in memory while something happens."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    act()
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [x for x in status.split("\n") if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def in_turn(w: Bench, kind: str, count: int, rounds: int = ROUNDS) -> dict[str, float]:
    """The medians of rounds in which each way has its turn."""
    found: dict[str, list[float]] = {"direct": [], "ours": [], "stock": []}
    for how in found:
        w.client(kind, max(3, count // 10), how=how)
    for _ in range(rounds):
        for how, times in found.items():
            times.append(w.client(kind, count, how=how))
    return {how: sorted(times)[len(times) // 2] for how, times in found.items()}


def measures(w: Bench) -> Iterator[Measure]:
    (worker,) = w.started_workers()
    with stock(w):
        for kind, count, unit, name in (
            ("connections", CONNECTIONS, "ms", "a new HTTPS connection with one request"),
            ("requests", REQUESTS, "requests/s", "requests on one kept connection"),
            ("events", STREAMS, "ms", "first byte of an event stream"),
        ):
            for how, value in in_turn(w, kind, count, 3 if kind == "events" else ROUNDS).items():
                yield Measure(
                    f"{name}, {how}", f"{value:.2f} {unit}", f"median of rounds of {count}"
                )
    speeds = {"direct": w.client("body", BODY, how="direct")}
    ours = peak_megabytes(worker, lambda: speeds.update(ours=w.client("body", BODY, how="ours")))
    with stock(w, "--set", "stream_large_bodies=1m") as pid:
        w.client("connections", 3, how="stock")
        theirs = peak_megabytes(
            pid, lambda: speeds.update(stock=w.client("body", BODY, how="stock"))
        )
    for how, speed in speeds.items():
        yield Measure(f"a body of 1 GiB, {how}", f"{speed:.0f} MB/s", "once")
    yield Measure("memory while it streams, ours", f"{ours:.0f} MB", "peak RSS of the worker")
    yield Measure("memory while it streams, stock", f"{theirs:.0f} MB", "peak RSS of mitmdump")


def main() -> None:
    subprocess.run(["make", "-s", "-C", str(REPOSITORY), str(MITMDUMP.relative_to(REPOSITORY))],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    with world(kind=Bench) as w:
        assert isinstance(w, Bench)
        w.origin()
        w.gateway.rules["allowed.test"] = lambda action: (
            inspect() if action["kind"] == "net.connect" else decision()
        )
        for found in measures(w):
            print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
