"""The service as a whole, against a stand-in for the gateway: rung, runs, records, gaps."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aa.ebpf import libbpf
from aa.ebpf.events import LAYOUT
from aa.ebpf.loader import unload
from aa.ebpf.service import CANARY_RETRY_SECONDS
from aa.ebpf.tables import End
from aa.model import Effect, Kind, Layer, RecordType, Report, RunState
from tests.host.ebpf_gateway import Gateway
from tests.host.ebpf_world import (
    COMMAND_SECONDS,
    OBJECTS,
    PYTHON,
    SERVER4,
    World,
    eventually,
    ids,
)

SERVICE = Path(__file__).with_name("ebpf_service.py")
READY_SECONDS = 15.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.make("s")
    yield world
    world.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path / "enforce")
    gateway.open()
    yield gateway
    gateway.close()


class Running:
    """The service as a process in a network namespace without firewall rules."""

    def __init__(self, world: World, gateway: Gateway, *, objects: Path = OBJECTS) -> None:
        self.process = subprocess.Popen(
            world.command(
                world.outside,
                world.client,
                PYTHON,
                str(SERVICE),
                str(world.pins),
                str(objects),
                str(gateway.path),
                str(world.root),
                world.slices.agents,
                world.slices.proxy,
            ),
            text=True,
            stderr=subprocess.PIPE,
        )

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Ends it; what it logged."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=COMMAND_SECONDS)
        return str(err)


@contextlib.contextmanager
def service(
    world: World, gateway: Gateway, *, rung: str = "cgroup", objects: Path = OBJECTS
) -> Iterator[Running]:
    running = Running(world, gateway, objects=objects)
    try:
        assert eventually(lambda: gateway.rung == rung, seconds=READY_SECONDS), gateway.statuses
        yield running
    finally:
        log = running.stop()
        assert "Traceback" not in log, log


def found(
    gateway: Gateway, test: Callable[[Report], bool], *, seconds: float = 6.0
) -> Report | None:
    return eventually(lambda: next(filter(test, list(gateway.reports)), None), seconds=seconds)


def begin(world: World, gateway: Gateway, where: Path, id: str = "r1") -> Path:
    """A run in state starting, in a cgroup of its own."""
    cgroup = world.run_dir(where, f"aa-agent-{id}.service")
    gateway.starting(id, str(cgroup.relative_to(world.root)), ids(cgroup))
    return cgroup


def test_proves_the_rung_and_confirms_a_run(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        state, details = gateway.statuses[-1]
        assert state == "rung cgroup"
        assert details["problems"] == []
        begin(world, gateway, world.proxied, "r1")
        begin(world, gateway, world.local, "r2")
        assert eventually(lambda: gateway.confirmed.keys() >= {"r1", "r2"})
        assert gateway.confirmed == {"r1": (True, ""), "r2": (True, "")}


def test_refuses_to_vouch_for_a_run_outside_the_slice_or_with_another_cgroup(
    world: World, gateway: Gateway
) -> None:
    with service(world, gateway):
        outside = world.run_dir(world.outside, "aa-agent-x.service")
        gateway.starting("x", str(outside.relative_to(world.root)), ids(outside))
        inside = world.run_dir(world.proxied, "aa-agent-y.service")
        gateway.starting("y", str(inside.relative_to(world.root)), ids(inside) + 1)
        assert eventually(lambda: gateway.confirmed.keys() >= {"x", "y"})
        assert gateway.confirmed["x"][0] is False
        assert "is not below" in gateway.confirmed["x"][1]
        assert gateway.confirmed["y"][0] is False
        assert "another one than was announced" in gateway.confirmed["y"][1]


def test_says_nothing_of_a_run_without_the_kernel_layer(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        cgroup = world.run_dir(world.proxied, "aa-agent-p.service")
        gateway.starting("p", str(cgroup.relative_to(world.root)), ids(cgroup), (Layer.PROXY,))
        begin(world, gateway, world.proxied, "k")
        assert eventually(lambda: "k" in gateway.confirmed)
        assert "p" not in gateway.confirmed


def test_a_run_without_the_kernel_layer_is_guarded_and_not_observed(
    world: World, gateway: Gateway
) -> None:
    with service(world, gateway):
        cgroup = world.run_dir(world.proxied, "aa-agent-p.service")
        gateway.starting("p", str(cgroup.relative_to(world.root)), ids(cgroup), (Layer.PROXY,))
        time.sleep(0.3)
        world.do(cgroup, "/bin/echo", "unobserved")
        world.python(cgroup, "attempt(udp, sys.argv[1], 8862)", SERVER4)
        refused = found(gateway, lambda r: r.target == f"{SERVER4}:8862")
        assert refused is not None and refused.run == "p" and refused.effect is Effect.DENY
        time.sleep(1.0)
        assert {r.type for r in gateway.reports if r.run == "p"} == {RecordType.REFUSAL}


def test_what_a_run_did_before_it_was_known_comes_first(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        cgroup = world.run_dir(world.local, "aa-agent-o.service")
        world.do(cgroup, "/bin/echo", "before")
        gateway.starting("o", str(cgroup.relative_to(world.root)), ids(cgroup))
        assert eventually(lambda: "o" in gateway.confirmed)
        world.do(cgroup, "/bin/echo", "after")
        assert found(gateway, lambda r: "after" in r.attributes.get("argv", ()))
        told = [
            r.attributes["argv"][-1]
            for r in gateway.reports
            if r.kind is Kind.EXEC and r.target == "/bin/echo"
        ]
        assert told == ["before", "after"]


def test_reports_exec_exit_and_connect_with_the_run(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        run = begin(world, gateway, world.local)
        world.do(run, "/bin/echo", "hello")
        world.python(run, "attempt(tcp, '127.0.0.1', 8088)")
        record = found(gateway, lambda r: r.kind is Kind.EXEC and r.target == "/bin/echo")
        assert record is not None
        assert record.run == "r1"
        assert record.type is RecordType.OBSERVED and record.layer is Layer.KERNEL
        assert record.attributes["argv"] == ["/bin/echo", "hello"]
        assert abs(record.time - time.time_ns()) < 60e9
        ended = found(gateway, lambda r: r.kind is Kind.EXIT and r.target == "/bin/echo")
        assert ended is not None and ended.attributes["code"] == 0
        asked = found(gateway, lambda r: r.target == "127.0.0.1:8088")
        assert asked is not None and asked.kind is Kind.NET_CONNECT and asked.run == "r1"
        assert asked.attributes["program"] == "/usr/bin/python3"
        assert not [r for r in gateway.reports if "aa-canary" in str(r)]
        assert {r.run for r in gateway.reports if r.kind is not Kind.GUARD} == {"r1"}


def test_reports_files_that_are_made_removed_and_renamed(
    world: World, gateway: Gateway, tmp_path: Path
) -> None:
    with service(world, gateway):
        run = begin(world, gateway, world.local)
        assert eventually(lambda: "r1" in gateway.confirmed)
        code = """
        os.chdir(sys.argv[1])
        for n in range(3):
            open("x", "w").close()
        os.rename("x", "y")
        os.unlink("y")
        attempt(os.unlink, "y")
        """
        world.python(run, code, str(tmp_path))
        last = found(gateway, lambda r: r.attributes.get("error") == "ENOENT" and "y" in r.target)
        assert last is not None and last.kind is Kind.FILE_UNLINK
        told = [
            (r.kind, r.target, r.attributes.get("to"), r.count)
            for r in gateway.reports
            if r.target.startswith(str(tmp_path)) and r.run == "r1" and "error" not in r.attributes
        ]
        x, y = f"{tmp_path}/x", f"{tmp_path}/y"
        assert told == [
            (Kind.FILE_OPEN, x, None, 1),
            (Kind.FILE_OPEN, x, None, 2),
            (Kind.FILE_RENAME, x, y, 1),
            (Kind.FILE_UNLINK, y, None, 1),
        ]
        made = next(r for r in gateway.reports if r.target == x)
        assert made.type is RecordType.OBSERVED and made.layer is Layer.KERNEL
        assert made.attributes["access"] == "create" and made.attributes["exact"] is True
        assert made.attributes["program"] == "/usr/bin/python3"


def test_file_calls_are_watched_while_a_run_is_to_be_observed_only(
    world: World, gateway: Gateway, tmp_path: Path
) -> None:
    """For they cost every task of the machine. A service that is killed and restarted goes on."""
    pin = world.pins / "links" / "aa_on_file"
    with service(world, gateway) as running:
        assert eventually(lambda: not pin.exists()), "what an earlier life left is taken out"
        cgroup = world.run_dir(world.proxied, "aa-agent-p.service")
        gateway.starting("p", str(cgroup.relative_to(world.root)), ids(cgroup), (Layer.PROXY,))
        time.sleep(1.5)
        assert not pin.exists(), "nobody wants it"
        run = begin(world, gateway, world.local)
        assert eventually(lambda: "r1" in gateway.confirmed)
        assert pin.exists()
        running.stop(signal.SIGKILL)
        world.python(run, "open(sys.argv[1], 'w').close()", f"{tmp_path}/alone")
    with service(world, gateway):
        assert found(gateway, lambda r: r.target == f"{tmp_path}/alone")
        world.python(run, "open(sys.argv[1], 'w').close()", f"{tmp_path}/again")
        assert found(gateway, lambda r: r.target == f"{tmp_path}/again")
        gateway.tell(replace(gateway.runs["r1"], state=RunState.ENDED))
        assert eventually(lambda: not pin.exists(), seconds=10)
        assert gateway.rung == "cgroup"


def test_a_run_with_too_many_files_is_told_by_directory_and_nothing_is_missing(
    world: World, gateway: Gateway, tmp_path: Path
) -> None:
    with service(world, gateway):
        run = begin(world, gateway, world.local)
        assert eventually(lambda: "r1" in gateway.confirmed)
        code = """
        for d in range(200):
            os.mkdir(f"{sys.argv[1]}/{d}")
            for n in range(5):
                open(f"{sys.argv[1]}/{d}/{n}", "w").close()
        """
        world.python(run, code, str(tmp_path))
        world.do(run, "/bin/echo", "end")

        def mine() -> list[Report]:
            return [
                r
                for r in list(gateway.reports)
                if r.kind is Kind.FILE_OPEN and r.attributes.get("comm", "python3") == "python3"
            ]

        assert eventually(lambda: sum(r.count for r in mine()) >= 1200, seconds=10)
        told = mine()
        assert sum(r.count for r in told) == 1200
        assert len(told) < 600
        gathered = [r for r in told if r.attributes.get("gathered")]
        assert any(r.target.startswith(str(tmp_path)) and r.target.endswith("/") for r in gathered)
        assert not [r for r in gateway.reports if r.type is RecordType.GAP]


def test_equal_events_become_one_record_with_a_count(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        run = begin(world, gateway, world.local)
        world.do(
            run, "/bin/sh", "-c", "i=0; while [ $i -lt 40 ]; do /bin/true same; i=$((i+1)); done"
        )

        def same() -> list[Report]:
            return [r for r in gateway.reports if r.target == "/bin/true" and r.kind is Kind.EXEC]

        assert eventually(lambda: sum(r.count for r in same()) >= 40)
        assert sum(r.count for r in same()) == 40
        assert len(same()) < 5


def test_a_refusal_is_a_record_with_run_rule_and_exact_count(
    world: World, gateway: Gateway
) -> None:
    code = """
    s = socket.socket(AF4, UDP)
    for _ in range(3000):
        attempt(s.sendto, b"x", (sys.argv[1], 8861))
    """
    with service(world, gateway):
        run = begin(world, gateway, world.proxied)
        world.python(run, code, SERVER4)
        target = f"{SERVER4}:8861"

        def refusals() -> list[Report]:
            return [r for r in gateway.reports if r.target == target and r.effect]

        assert eventually(lambda: sum(r.count for r in refusals()) >= 3000)
        assert sum(r.count for r in refusals()) == 3000
        record = refusals()[0]
        assert record.type is RecordType.REFUSAL and record.effect is Effect.DENY
        assert (record.run, record.rule) == ("r1", "<kernel-guard>")
        assert record.reason


def test_events_wait_for_a_run_that_is_told_later(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        cgroup = world.run_dir(world.local, "aa-agent-late.service")
        world.do(cgroup, "/bin/echo", "early")
        time.sleep(0.7)
        assert not [r for r in gateway.reports if r.target == "/bin/echo"]
        gateway.starting("late", str(cgroup.relative_to(world.root)), ids(cgroup))
        record = found(gateway, lambda r: r.target == "/bin/echo")
        assert record is not None and record.run == "late"
        stranger = world.run_dir(world.local, "aa-agent-nobody.service")
        world.do(stranger, "/bin/echo", "strange")
        record = found(gateway, lambda r: "strange" in r.attributes.get("argv", ()))
        assert record is not None and record.run == "?"


def test_the_last_events_of_an_ended_run_are_still_its_own(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        cgroup = begin(world, gateway, world.local, "short")
        assert eventually(lambda: "short" in gateway.confirmed)
        run = gateway.runs["short"]
        gateway.tell(
            type(run)(**{**{f: getattr(run, f) for f in run.__slots__}, "state": RunState.ENDED})
        )
        time.sleep(0.2)
        world.do(cgroup, "/bin/echo", "late")
        record = found(gateway, lambda r: r.target == "/bin/echo")
        assert record is not None and record.run == "short"


def test_killed_and_started_again_guards_reads_and_reports_on(
    world: World, gateway: Gateway
) -> None:
    run = world.run_dir(world.proxied, "aa-agent-r1.service")
    gateway.starting("r1", str(run.relative_to(world.root)), ids(run))
    with service(world, gateway) as first:
        first.process.kill()
        first.process.wait(COMMAND_SECONDS)
        assert world.python(run, "print(attempt(socket.socket, AF4, 3, 1))") == str(errno.EPERM)
        world.do(run, "/bin/echo", "in between")
    gateway.statuses.clear()
    with service(world, gateway):
        record = found(gateway, lambda r: "in between" in r.attributes.get("argv", ()))
        assert record is not None and record.run == "r1"
        refused = found(gateway, lambda r: r.target == "socket:inet/raw/icmp")
        assert refused is not None and refused.run == "r1"


def test_events_that_died_with_the_service_are_a_gap_with_a_number(
    world: World, gateway: Gateway
) -> None:
    """Read from the ring, not handed over: the gateway was away, then the service was killed."""
    unload(world.pins)  # and with it what earlier tests left unaccounted for
    with service(world, gateway) as first:
        run = begin(world, gateway, world.local, "g")
        assert eventually(lambda: "g" in gateway.confirmed)
        time.sleep(1.5)
        gateway.shut()
        for n in range(7):
            world.do(run, "/bin/echo", str(n))
        time.sleep(1.5)
        first.process.kill()
        first.process.wait(COMMAND_SECONDS)
    gateway.reports.clear()
    gateway.statuses.clear()
    gateway.open()
    with service(world, gateway):
        gap = found(
            gateway,
            lambda r: r.type is RecordType.GAP and "exec" in r.reason,
            seconds=10,
        )
        assert gap is not None
        assert gap.count == 7
        assert not [r for r in gateway.reports if r.target == "/bin/echo"]


def test_a_gateway_that_is_away_gets_the_records_later(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        run = begin(world, gateway, world.local, "w")
        assert eventually(lambda: "w" in gateway.confirmed)
        gateway.shut()
        world.do(run, "/bin/echo", "kept")
        time.sleep(1.0)
        gateway.open()
        record = found(gateway, lambda r: "kept" in r.attributes.get("argv", ()))
        assert record is not None and record.run == "w"


def test_an_overflowing_ring_is_counted_and_reported(world: World, gateway: Gateway) -> None:
    """The service is stopped (SIGSTOP) while a run does more than the ring holds."""
    code = """
    for port in range(1, 15001):
        s = socket.socket(AF4, UDP)
        s.connect(("127.0.0.1", 1 + port % 60000))
        s.close()
    print("done")
    """
    with service(world, gateway) as running:
        run = begin(world, gateway, world.local, "f")
        assert eventually(lambda: "f" in gateway.confirmed)
        running.process.send_signal(signal.SIGSTOP)
        try:
            assert world.python(run, code) == "done"
            world.do(run, "/bin/echo", "not drowned")
        finally:
            running.process.send_signal(signal.SIGCONT)
        record = found(gateway, lambda r: "not drowned" in r.attributes.get("argv", ()), seconds=20)
        assert record is not None, "the last quarter of the ring is for exec and exit"

        def told() -> int:
            return gateway.lost + sum(
                r.count
                for r in list(gateway.reports)
                if r.kind is Kind.NET_CONNECT
                and r.run == "f"
                or r.type is RecordType.GAP
                and "connect" in r.reason
            )

        assert eventually(lambda: told() >= 15000, seconds=20)
        assert told() == 15000
        gap = found(gateway, lambda r: r.type is RecordType.GAP)
        assert gap is not None and "the ring was full" in gap.reason and gap.count > 1000


def test_a_slice_made_again_is_guarded_within_seconds_and_told(
    world: World, gateway: Gateway
) -> None:
    with service(world, gateway):
        world.remove_slices()
        world.make_slices()
        run = begin(world, gateway, world.proxied, "again")
        # The confirmation itself looks, so no run can start between two looks.
        assert eventually(lambda: "again" in gateway.confirmed)
        raw = "print(attempt(socket.socket, AF4, 3, 1))"
        assert eventually(lambda: world.python(run, raw) == str(errno.EPERM), seconds=3)
        assert found(gateway, lambda r: "was made again" in r.reason)


def test_a_guard_that_is_taken_away_costs_the_rung_and_stops_new_runs(
    world: World, gateway: Gateway
) -> None:
    """Somebody with root replaces our program behind the link: attached still, and guarding nothing."""
    with service(world, gateway):
        link = libbpf.get_pinned(world.pins / "links" / "aa_egress")
        assert link is not None
        with libbpf.BpfObject(OBJECTS / "guard_cgroup.bpf.o") as other:
            other.select(frozenset({"aa_egress"}))
            other.load()
            fd = other.program_fd("aa_egress")
            libbpf.update_link(link, fd)
        os.close(fd)
        os.close(link)
        begin(world, gateway, world.proxied, "after")
        assert eventually(lambda: "after" in gateway.confirmed, seconds=CANARY_RETRY_SECONDS + 5)
        # Seen at once, put right, and only then vouched for.
        assert gateway.confirmed["after"] == (True, "")
        assert found(gateway, lambda r: "aa_egress replaced" in r.reason)
        assert eventually(lambda: gateway.rung == "cgroup")


def test_an_end_that_somebody_added_is_taken_out_again_and_told(
    world: World, gateway: Gateway
) -> None:
    with service(world, gateway):
        run = world.run_dir(world.proxied)
        code = "print(attempt(udp, sys.argv[1], 53))"
        table = libbpf.get_pinned(world.pins / f"maps-{LAYOUT}" / "aa_ends")
        assert table is not None
        hole = End(ipaddress.IPv4Address(SERVER4), 53, socket.IPPROTO_UDP)
        libbpf.map_update(table, hole.pack(), b"\1")
        os.close(table)
        assert found(gateway, lambda r: "ends put right" in r.reason)
        assert world.python(run, code, SERVER4) == str(errno.EPERM)


def test_without_a_guard_the_rung_is_observe_and_proxied_runs_are_not_vouched_for(
    world: World, gateway: Gateway, tmp_path: Path
) -> None:
    unload(world.pins)
    objects = tmp_path / "objects"
    objects.mkdir()
    (objects / "observe.bpf.o").write_bytes((OBJECTS / "observe.bpf.o").read_bytes())
    (objects / "guard_cgroup.bpf.o").write_bytes(b"no object")
    with service(world, gateway, rung="observe", objects=objects):
        assert "aa_egress" in gateway.statuses[-1][1]["refused_programs"]
        begin(world, gateway, world.proxied, "p")
        begin(world, gateway, world.local, "l")
        assert eventually(lambda: gateway.confirmed.keys() >= {"p", "l"})
        assert gateway.confirmed["p"][0] is False
        assert "egress guard" in gateway.confirmed["p"][1]
        assert gateway.confirmed["l"] == (True, "")


def test_with_no_object_at_all_it_does_not_start_and_says_why(
    world: World, gateway: Gateway, tmp_path: Path
) -> None:
    running = Running(world, gateway, objects=tmp_path)
    assert running.process.wait(COMMAND_SECONDS) == 1
    log = running.stop()
    assert "cannot be loaded" in log and "Traceback" not in log


def test_stopping_it_leaves_the_guard(world: World, gateway: Gateway) -> None:
    with service(world, gateway):
        pass
    run = world.run_dir(world.proxied)
    assert world.python(run, "print(attempt(socket.socket, AF4, 3, 1))") == str(errno.EPERM)
    assert world.python(run, "print(attempt(socket.socket, AF4, TCP))") == "0"
