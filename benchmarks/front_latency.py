"""What the front alone adds: new TLS connections and a download, through it and direct, in one run.

    sudo /usr/bin/python3 -m benchmarks.front_latency [ROUNDS]

Own namespaces, a real redirect, the real daemon; the gateway is a stand-in that answers at
once, so what the policy costs is not in these numbers (`make bench` has the whole chain).
Prints one JSON line per measure.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measures import Measure
from tests.host.front_world import PYTHON, RUN, World, decision, world

CONNECTIONS = 100  # of one round
ROUNDS = 5
BYTES = 400_000_000
PORT = 9443
HOST = "allowed.test"

ORIGIN = """
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
block = bytes(1 << 20)
def serve(raw, tls):
    with raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            s = context.wrap_socket(raw, server_side=True) if tls else raw
            size = int(s.recv(4096).split()[1].rpartition(b"/")[2] or b"0")
            s.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
            while size > 0:
                size -= s.send(block[:size])
        except OSError:
            pass
def accept(port, tls):
    listener = socket.create_server((sys.argv[2], port), backlog=256)
    sys.stdout.write("listening\\n"); sys.stdout.flush()
    while True:
        raw, _ = listener.accept()
        threading.Thread(target=serve, args=(raw, tls), daemon=True).start()
threading.Thread(target=accept, args=(int(sys.argv[3]), True), daemon=True).start()
accept(int(sys.argv[3]) + 1, False)
"""

CONNECT = """
import json, socket, ssl, sys, time
host, address, port, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
context = ssl.create_default_context(cafile=sys.argv[5])
times = []
for _ in range(count + 3):
    began = time.perf_counter()
    with socket.create_connection((address, port)) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(raw, server_hostname=host) as s:
            s.sendall(b"GET /0 HTTP/1.1\\r\\nHost: %b\\r\\n\\r\\n" % host.encode())
            assert s.recv(4096).startswith(b"HTTP/1.1 200")
    times.append(1000 * (time.perf_counter() - began))
print(json.dumps(times[3:]))
"""

DOWNLOAD = """
import socket, sys, time
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
buffer = bytearray(1 << 20)
began, got = time.perf_counter(), 0
with socket.create_connection((address, port)) as s:
    s.sendall(b"GET /%d HTTP/1.1\\r\\nHost: allowed.test:%d\\r\\n\\r\\n" % (size, port))
    while n := s.recv_into(buffer):
        got += n
assert got > size
print(got / (time.perf_counter() - began))
"""

Act = Callable[..., str]


def measures(w: World, rounds: int = ROUNDS) -> Iterator[Measure]:
    w.gateway.rules[HOST] = decision()
    leaf, address = w.directory / "leaf.pem", "10.77.0.2"
    origin = w.lab.start_peer(PYTHON, "-c", ORIGIN, str(leaf), address, str(PORT))
    assert origin.stdout is not None
    assert [origin.stdout.readline() for _ in range(2)] == ["listening\n"] * 2

    def governed(script: str, *arguments: str) -> str:
        return str(w.lab.governed(RUN, PYTHON, "-I", "-c", script, *arguments).stdout)

    def direct(script: str, *arguments: str) -> str:
        return w.lab.run(PYTHON, "-I", "-c", script, *arguments).stdout

    yield _latency(w, governed, direct, address, rounds)
    yield _throughput(governed, direct, address, rounds)
    status = Path(f"/proc/{w.proxy_pid}/status").read_text().split()
    kib = int(status[status.index("VmRSS:") + 1])
    yield Measure("memory of aa-proxy after it", f"{kib / 1024:.1f} MiB", "resident")


def _latency(w: World, governed: Act, direct: Act, address: str, rounds: int) -> Measure:
    times: dict[Act, list[float]] = {governed: [], direct: []}
    for _ in range(rounds):
        for act, found in times.items():
            arguments = (HOST, address, str(PORT), str(CONNECTIONS), str(w.ca))
            found += json.loads(act(CONNECT, *arguments))
    through, straight = (statistics.median(found) for found in times.values())
    return Measure(
        "new TLS connection, added by the front",
        f"{through - straight:+.2f} ms",
        f"{through:.2f} ms through it, {straight:.2f} ms direct; medians of {CONNECTIONS * rounds}",
    )


def _throughput(governed: Act, direct: Act, address: str, rounds: int) -> Measure:
    rates: dict[Act, list[float]] = {governed: [], direct: []}
    for _ in range(rounds):
        for act, found in rates.items():
            found.append(float(act(DOWNLOAD, address, str(PORT + 1), str(BYTES))))
    through, straight = (statistics.median(found) / 1e6 for found in rates.values())
    return Measure(
        "one download through the front",
        f"{through:.0f} MB/s",
        f"{straight:.0f} MB/s direct; medians of {rounds} of {BYTES // 1_000_000} MB",
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with world() as w:
        for measure in measures(w, rounds):
            print(json.dumps(dataclasses.asdict(measure)), flush=True)


if __name__ == "__main__":
    main()
