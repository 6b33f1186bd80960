"""What watching costs the programs that are watched, and those that are not: system calls, execs and TLS calls.

    sudo /usr/bin/python3 -m benchmarks.kernel_costs [ROUNDS]

Own cgroups and pins, the real programs; a thread empties the rings. Without and with the programs take turns
in one run, and each number is the median of the rounds. Prints one JSON line per measure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from aa.ebpf import tables
from aa.ebpf.libbpf import Ring
from aa.ebpf.loader import Loader, unload
from aa.ebpf.tls.capture import KNOWN_LIBRARIES
from aa.ebpf.tls.probes import Probes
from benchmarks.measures import Measure
from tests.host.ebpf_world import OBJECTS, PYTHON, World, sh

ROUNDS = 7
TIMEOUT = 120.0  # seconds for one program of one round

CALLS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static double since;
static void begin(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	since = t.tv_sec * 1e9 + t.tv_nsec;
}
static void end(const char *name, int count)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	printf("%s\t%f\n", name, (t.tv_sec * 1e9 + t.tv_nsec - since) / count);
}
int main(int argc, char **argv)
{
	char *child[] = {"/bin/true", NULL};
	int i, status, f;
	pid_t pid;

	begin();
	for (i = 0; i < 500000; i++)
		syscall(SYS_getppid);
	end("the shortest system call (getppid)", i);
	begin();
	for (i = 0; i < 100000; i++)
		close(open("/etc/passwd", O_RDONLY));
	end("open for reading and close", i);
	/* Below the rate of a run, so that each is told. */
	begin();
	for (i = 0; i < 500; i++)
		close(open(argv[1], O_WRONLY | O_CREAT, 0600));
	end("open for writing and close", i);
	begin();
	for (i = 0; i < 500; i++) {
		close(open(argv[1], O_WRONLY | O_CREAT, 0600));
		unlink(argv[1]);
	}
	end("create, close and unlink", i);
	begin();
	for (i = 0; i < 300; i++) {
		posix_spawn(&pid, child[0], NULL, NULL, child, NULL);
		waitpid(pid, &status, 0);
	}
	end("spawn, exec, exit and wait (/bin/true)", i);
	return 0;
}
"""

TLS = """
import ssl, sys, time
def pair(certificate):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
    while True:
        done = 0
        for end in ends:
            try:
                end.do_handshake(); done += 1
            except ssl.SSLWantReadError:
                pass
        if done == 2:
            return ends
client, server = pair(sys.argv[1])
def rate(what, count):
    began = time.perf_counter()
    for _ in range(count):
        client.write(what); server.read(16384)
    return (time.perf_counter() - began) * 1e9 / count
request = b"GET /index HTTP/1.1\\r\\nHost: site.test\\r\\n\\r\\n"
body = b"\\0" + bytes(16383)
print(f"TLS write and read of a request\\t{rate(request, 500)}")
print(f"TLS write and read of 16 KiB of a body\\t{rate(body, 3000)}")
"""

Times = dict[str, list[float]]
States = dict[str, Callable[[], contextlib.AbstractContextManager[None]]]


@dataclasses.dataclass
class Bench:
    """Who runs what: a program in a run's cgroup, and the same program outside."""

    world: World
    directory: Path
    program: Path
    certificate: Path

    def calls(self, cgroup: Path) -> dict[str, float]:
        return _figures(self.world.do(cgroup, str(self.program), f"{self.directory}/x").stdout)

    def tls(self, cgroup: Path) -> dict[str, float]:
        done = self.world.do(cgroup, PYTHON, "-I", "-c", TLS, str(self.certificate))
        return _figures(done.stdout)

    def walk(self, cgroup: Path) -> dict[str, float]:
        """A program that does little else than system calls on files."""
        script = 'a=$(date +%s%N); tar c /usr/share/zoneinfo 2>/dev/null | cat >/dev/null; b=$(date +%s%N); echo "tar of /usr/share/zoneinfo\t$((b - a))"'
        return _figures(self.world.do(cgroup, "sh", "-c", script).stdout)


def _figures(out: str) -> dict[str, float]:
    rows = (line.split("\t") for line in out.splitlines())
    return {name: float(value) for name, value in rows}


@contextlib.contextmanager
def draining(*rings: int) -> Iterator[None]:
    """A thread takes everything out of the rings."""
    stop = threading.Event()

    def drain() -> None:
        readers = [Ring(fd, lambda _: True) for fd in rings]
        while not stop.wait(0.002):
            for reader in readers:
                reader.consume()
        for reader in readers:
            reader.close()

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def loaded(world: World, *, files: bool) -> Iterator[Loader]:
    loader = Loader(pins=world.pins, objects=OBJECTS, slices=world.slices)
    loader.open()
    try:
        loader.load(tables.proxy_ends())
        loader.watch_files(files)
        with draining(loader.ring_fd):
            yield loader
    finally:
        loader.close()
        unload(world.pins)


@contextlib.contextmanager
def probed(world: World, *, together: bool) -> Iterator[None]:
    with loaded(world, files=False) as loader:
        probes = Probes(OBJECTS, loader.shared_maps(), together=together)
        probes.open()
        try:
            for pattern in KNOWN_LIBRARIES[:1]:
                for path in Path("/").glob(pattern.lstrip("/")):
                    with path.open("rb") as library:
                        probes.attach(library.fileno(), str(path))
            with draining(probes.ring_fd):
                yield
        finally:
            probes.close()


@contextlib.contextmanager
def watched(world: World) -> Iterator[None]:
    with loaded(world, files=True):
        yield


@contextlib.contextmanager
def idle(world: World) -> Iterator[None]:
    """As it is without a run: loaded, file calls not watched."""
    with loaded(world, files=False):
        yield


def compare(
    bench: Bench, act: Callable[[Path], dict[str, float]], states: States, rounds: int
) -> Iterator[Measure]:
    """Each act in each state and cgroup; the states take turns."""
    places = {
        "ungoverned": bench.world.outside,
        "governed": bench.world.run_dir(bench.world.local),
    }
    found: dict[tuple[str, str], Times] = {}
    for _ in range(rounds):
        for state, enter in states.items():
            with enter():
                for place, cgroup in places.items():
                    times = found.setdefault((place, state), defaultdict(list))
                    for name, value in act(cgroup).items():
                        times[name].append(value)
    base = next(iter(states))
    for place in places:
        for name, plain in found[place, base].items():
            without = statistics.median(plain)
            for state in [s for s in states if s != base]:
                having = statistics.median(found[place, state][name])
                yield Measure(
                    f"{place}: {name}, {state}",
                    f"{_time(having - without, sign='+')}",
                    f"{_time(having)} instead of {_time(without)}; medians of {rounds} rounds",
                )


def _time(nanoseconds: float, sign: str = "") -> str:
    if abs(nanoseconds) < 1000:
        return f"{nanoseconds:{sign}.0f} ns"
    if abs(nanoseconds) < 1e6:
        return f"{nanoseconds / 1e3:{sign}.1f} us"
    return f"{nanoseconds / 1e6:{sign}.1f} ms"


def measures(rounds: int = ROUNDS) -> Iterator[Measure]:
    world = World.make("k")
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            bench = _prepare(world, Path(name))

            def nothing() -> contextlib.AbstractContextManager[None]:
                return contextlib.nullcontext()

            states: States = {
                "nothing loaded": nothing,
                "without a run": lambda: idle(world),
                "while a run is observed": lambda: watched(world),
            }
            yield from compare(bench, bench.calls, states, rounds)
            yield from compare(bench, bench.walk, states, rounds)
            states = {
                "no probes": nothing,
                "with probes in libssl": lambda: probed(world, together=True),
                "with probes in libssl, one by one": lambda: probed(world, together=False),
            }
            yield from compare(bench, bench.tls, states, rounds)
    finally:
        world.close()


def _prepare(world: World, directory: Path) -> Bench:
    source, program = directory / "calls.c", directory / "calls"
    source.write_text(CALLS)
    sh("gcc", "-O2", "-o", str(program), str(source))
    pem = directory / "pem"
    sh(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-days", "2", "-subj", "/CN=site.test", "-keyout", str(pem)),
        *("-out", str(directory / "cert")),
    )
    with pem.open("a") as both:
        both.write((directory / "cert").read_text())
    return Bench(world, directory, program, pem)


def machine() -> str:
    """What the numbers are of."""
    model = next(
        (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        "",
    )
    openssl = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True)
    return (
        f"{os.cpu_count()} cores, {model.partition(': ')[2]}, Linux {platform.release()}, "
        f"{openssl.stdout.strip()}"
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(json.dumps({"machine": machine()}), flush=True)
    for measure in measures(rounds):
        print(json.dumps(dataclasses.asdict(measure)), flush=True)


if __name__ == "__main__":
    main()
