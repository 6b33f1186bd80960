"""`aasm runs show RUN --timeline`: a run's records as lines for people, through a real gateway and its socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aa.cli.main import root
from aa.cli.timeline import MAX_CELL, row
from aa.gateway.gateway import Gateway
from aa.gateway.interfaces import control_service
from aa.model import Kind, Layer, RecordType, Report, Run
from aa.varlink import Server
from tests.unit.test_gateway import Open, connect, open_gateway, policies, start_run

__all__ = ["open_gateway", "policies"]  # fixtures

BEGAN = 1_800_000_000_000_000_000


def report(run: Run, kind: Kind, target: str, *, at: float, **more: Any) -> Report:
    """Seen `at` seconds after the beginning."""
    of = {"type": RecordType.OBSERVED, "layer": Layer.KERNEL} | more
    return Report(kind=kind, target=target, time=BEGAN + int(at * 1e9), run=run.id, **of)


@pytest.fixture
def gateway(open_gateway: Open) -> Gateway:
    return open_gateway()


@pytest.fixture
def aasm(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """The command, while the gateway is served."""
    monkeypatch.setattr("aa.cli.errors.CONTROL_SOCKET", tmp_path / "control")

    async def served(words: tuple[str, ...]) -> Result:
        server = Server.at(tmp_path / "control", control_service(gateway, pid=1))
        try:
            return await asyncio.to_thread(CliRunner(mix_stderr=False).invoke, root, words)
        finally:
            server.close()

    return lambda *words: asyncio.run(served(words))


def busy_run(gateway: Gateway) -> Run:
    """A run with one record of each kind, told in another order than it happened."""
    run = start_run(gateway, frozenset({Layer.PROXY, Layer.KERNEL}))
    process = {"pid": 7, "comm": "curl", "program": "/usr/bin/curl"}
    seen = [
        report(run, Kind.EXEC, "/usr/bin/curl", at=1, attributes={"argv": ["curl", "-o", "a b", "x"], "exe": "/usr/bin/curl", "pid": 7}),
        report(run, Kind.EXIT, "/usr/bin/curl", at=9, attributes={"code": 0, "seconds": 8.0, **process}),
        report(run, Kind.FILE_OPEN, "/w/a b", at=6, count=3, attributes={"access": "create", "exact": True, **process}),
        report(run, Kind.FILE_RENAME, "/w/a b", at=7, attributes={"to": "/w/c", "exact": False, **process}),
        report(run, Kind.FILE_UNLINK, "/w/c", at=8, attributes={"error": "EACCES", "exact": False, **process}),
        report(run, Kind.NET_CONNECT, "93.184.216.34:443", at=2, attributes={**process}),
        report(run, Kind.HTTP_REQUEST, "https://allowed.test/p", at=5, attributes={"source": "tls-probe", "method": "GET", "path": "/p", "peer": "93.184.216.34:443", "peer_exact": False, "bytes_out": 80, "bytes_in": 900, "decided": False, **process}),
        report(run, Kind.HTTP_REQUEST, "allowed.test:443", at=4, layer=Layer.PROXY, attributes={"method": "GET", "path": "/p", "status": 200}),
    ]  # fmt: skip
    gateway.component_reports("ebpf", 0, seen)
    return run


def what(result: Result) -> list[str]:
    """The third column of each line that begins with a time; the others go on with the one before."""
    lines = (line for line in result.stdout.splitlines() if line[:1].isdigit())
    return [line.split()[2] for line in lines]


def test_shows_what_a_run_did_in_the_order_it_happened(gateway: Gateway, aasm: Any) -> None:
    run = busy_run(gateway)
    result = aasm("runs", "show", run.id, "--timeline")
    assert result.exit_code == 0, result.stderr
    assert [w for w in what(result) if w != "run"] == [
        "exec",
        "connect",
        "request",
        "plaintext",
        "file",
        "rename",
        "remove",
        "exit",
    ]
    assert "/usr/bin/curl -o 'a b' x" in result.stdout
    assert "/w/a b -> /w/c" in result.stdout
    assert "EACCES" in result.stdout
    assert "no decided connection explains it" in result.stdout
    assert result.stderr == ""


def test_shows_the_kinds_that_are_asked_for(gateway: Gateway, aasm: Any) -> None:
    run = busy_run(gateway)
    chosen = ("--kind", "file.open", "--kind", "file.unlink")
    assert what(aasm("runs", "show", run.id, "--timeline", *chosen)) == ["file", "remove"]
    alone = aasm("runs", "show", run.id, "--kind", "file.open")
    assert alone.exit_code == 1 and "--timeline" in alone.stderr


def test_says_what_is_cut(gateway: Gateway, aasm: Any) -> None:
    run = busy_run(gateway)
    result = aasm("runs", "show", run.id, "--timeline", "-n", "2")
    assert len(what(result)) == 2
    assert "newest 2" in result.stderr


def test_json_has_the_records_as_they_are(gateway: Gateway, aasm: Any) -> None:
    run = busy_run(gateway)
    told = json.loads(aasm("runs", "show", run.id, "--timeline", "--json").stdout)
    assert told["run"] == run.id and told["cut"] == ""
    times = [r["time"] for r in told["records"]]
    assert times == sorted(times)
    assert {r["kind"] for r in told["records"]} >= {"exec", "exit", "file.open", "http.request"}


def test_a_run_that_ended_still_has_its_timeline(gateway: Gateway, aasm: Any) -> None:
    run = busy_run(gateway)
    gateway.end(run.id, exit_code=3, signal=None, reason="")
    result = aasm("runs", "show", run.id, "--timeline")
    assert "plaintext" in what(result)
    for n in range(3):
        gateway.registry._db.execute("delete from run where id = ?", (run.id,))
        gateway.decide(f"other{n}", Layer.PROXY, connect("x.test"))
    forgotten = aasm("runs", "show", run.id, "--timeline")
    assert "plaintext" in what(forgotten), "the log is the memory, not the registry"


def test_an_unknown_run_is_an_error(aasm: Any) -> None:
    result = aasm("runs", "show", "nobody", "--timeline")
    assert result.exit_code == 1 and "no run nobody" in result.stderr


def test_nothing_that_an_agent_chose_moves_the_terminal(gateway: Gateway, aasm: Any) -> None:
    run = start_run(gateway)
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\r\nx"
    about = {"argv": [evil, evil], "comm": evil, "pid": 1, "error": evil, "peer": evil, "of": evil}
    evils = [
        report(run, kind, evil, at=1, attributes={**about, "to": evil, "access": evil})
        for kind in (Kind.EXEC, Kind.FILE_OPEN, Kind.FILE_RENAME, Kind.HTTP_REQUEST, Kind.EXIT)
    ]
    gateway.component_reports("ebpf", 0, evils)
    out = aasm("runs", "show", run.id, "--timeline").stdout
    assert "\\x1b" in out
    assert all(c.isprintable() or c == "\n" for c in out)


@pytest.mark.parametrize(
    "attributes",
    [{}, None, [], {"argv": 3, "pid": {}, "seconds": "x"}, {"argv": [], "source": ["tls-probe"]}],
)
@pytest.mark.parametrize("kind", [*Kind, "else"])
def test_any_record_becomes_a_row(kind: str, attributes: Any) -> None:
    """The log may be of another version."""
    record = {
        "time": "2026-01-01T10:00:00.000000Z",
        "layer": "kernel",
        "kind": kind,
        "type": "observed",
        "target": "t" * 1000,
        "decision": "",
        "rule": "",
        "reason": "",
        "would": "",
        "count": 1,
        "attributes": attributes,
    }
    cells = row(record)
    assert len(cells) == 7 and all(isinstance(cell, str) for cell in cells)
    assert max(map(len, cells)) <= MAX_CELL
