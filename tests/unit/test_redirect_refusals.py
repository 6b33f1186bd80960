"""Refused packets become reports: blamed on the right run, merged, and none missing without a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.model import Effect, Layer, RecordType, Report, Run, RunState
from aa.nflog import Logged, Packet
from aa.redirect import refusals
from aa.redirect.refusals import Account, Culprit, Merger, Runs, attribute, refusal
from aa.sockdiag import SockDiag, SockDiagError, SocketOwner

SLICE = "aa.slice/aa-agents.slice/aa-agents-proxy.slice"


def run(name: str, *, cgroup_id: int, uid: int = 1000, **changes: Any) -> Run:
    given_: dict[str, Any] = {
        "layers": frozenset({Layer.PROXY}),
        "state": RunState.RUNNING,
        "cgroup": f"{SLICE}/aa-agent-{name}.service",
        "cgroup_id": cgroup_id,
        **changes,
    }
    return Run(name, "sample", "u", uid, **given_)


def logged(
    word: str = "udp", *, uid: int = 1000, protocol: int = 17, port: int = 9, version: int = 4
) -> Logged:
    ends = ("10.77.0.1", "10.77.0.2") if version == 4 else ("fd77::1", "fd77::2")
    packet = Packet(version, protocol, ends[0], 40000 if port else 0, ends[1], port)
    return Logged(packet, f"aa-redirect {word}", uid)


class Sockets(SockDiag):
    """Answers with given owners, or fails as the kernel may."""

    def __init__(self, *owners: SocketOwner, fails: bool = False) -> None:
        self.owners, self.fails = owners, fails
        self.asked: list[Any] = []

    def senders(self, *question: Any) -> tuple[SocketOwner, ...]:
        self.asked.append(question)
        if self.fails:
            raise SockDiagError("no")
        return self.owners

    def owner(self, *question: Any) -> SocketOwner | None:
        return next(iter(self.senders(*question)), None)


def owner(cgroup_id: int) -> SocketOwner:
    return SocketOwner(1000, 1, cgroup_id)


def test_the_sockets_cgroup_names_the_run() -> None:
    runs = Runs(lambda: [run("a", cgroup_id=5), run("b", cgroup_id=6)])
    assert attribute(logged(), runs, Sockets(owner(6))) == Culprit("b", "cgroup", 1000)


def test_a_cgroup_below_the_runs_belongs_to_the_run(tmp_path: Path) -> None:
    directory = tmp_path / SLICE / "aa-agent-b.service"
    below = directory / "sub" / "sub"
    below.mkdir(parents=True)
    runs = Runs(
        lambda: [run("a", cgroup_id=5), run("b", cgroup_id=directory.stat().st_ino)], tmp_path
    )
    found = attribute(logged(), runs, Sockets(owner(below.stat().st_ino)))
    assert found == Culprit("b", "cgroup", 1000)


def test_an_outsiders_socket_on_the_same_port_does_not_hide_the_run(tmp_path: Path) -> None:
    runs = Runs(lambda: [run("a", cgroup_id=5)], tmp_path)
    assert attribute(logged(), runs, Sockets(owner(1), owner(5))).run == "a"


def test_two_runs_on_the_same_port_blame_neither(tmp_path: Path) -> None:
    runs = Runs(lambda: [run("a", cgroup_id=5), run("b", cgroup_id=6)], tmp_path)
    sockets = Sockets(owner(5), owner(6))
    assert attribute(logged(), runs, sockets) == Culprit("", "unknown", 1000)


@pytest.mark.parametrize("sockets", [Sockets(), Sockets(fails=True)])
def test_the_user_names_the_run_only_where_it_has_one(sockets: Sockets) -> None:
    one = [run("a", cgroup_id=5), run("b", cgroup_id=6, uid=1001)]
    assert attribute(logged(), Runs(lambda: one), sockets) == Culprit("a", "uid", 1000)
    two = [*one, run("c", cgroup_id=7)]
    assert attribute(logged(), Runs(lambda: two), sockets) == Culprit("", "unknown", 1000)
    assert attribute(logged(uid=-1), Runs(lambda: one), sockets) == Culprit("", "unknown", -1)


def test_a_run_without_the_proxy_layer_is_never_blamed() -> None:
    runs = Runs(lambda: [run("a", cgroup_id=5, layers=frozenset({Layer.KERNEL}))])
    assert attribute(logged(), runs, Sockets()).run == ""


def test_a_run_that_has_just_ended_is_still_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(lambda: [])
    runs.ended(run("a", cgroup_id=5, state=RunState.ENDED))
    assert attribute(logged(), runs, Sockets(owner(5))).run == "a"
    assert attribute(logged(), runs, Sockets()).run == ""  # but not by its user alone
    monkeypatch.setattr(refusals, "ENDED_SECONDS", -1.0)
    assert attribute(logged(), runs, Sockets(owner(5))).run == ""


def test_an_inbound_packet_is_looked_up_by_our_end() -> None:
    sockets = Sockets()
    attribute(logged("inbound", protocol=6), Runs(lambda: []), sockets)
    assert sockets.asked[0][2:] == (("10.77.0.2", 9), ("10.77.0.1", 40000))


@pytest.mark.parametrize(
    ("packet", "target"),
    [
        (logged(port=53), "10.77.0.2:53/udp"),
        (logged(version=6), "[fd77::2]:9/udp"),
        (logged("other", protocol=1, port=0), "10.77.0.2/icmp"),
        (logged("other", protocol=58, port=0, version=6), "fd77::2/icmp6"),
        (logged("other", protocol=253, port=0), "10.77.0.2/253"),
        (logged("inbound", protocol=6), "10.77.0.1:40000/tcp"),
    ],
)
def test_a_report_names_the_other_side(packet: Logged, target: str) -> None:
    made = refusal(packet, Culprit("a", "cgroup", 1000))
    assert made.target == target
    assert (made.type, made.effect, made.rule) == (RecordType.REFUSAL, Effect.DENY, "<redirect>")
    assert made.reason and made.run == "a" and made.attributes["identity"] == "cgroup"


def test_quic_has_a_reason_of_its_own() -> None:
    assert "QUIC" in refusal(logged(port=443), Culprit("", "unknown", -1)).reason
    assert "QUIC" not in refusal(logged(port=444), Culprit("", "unknown", -1)).reason


def report_of(target: str, name: str = "a") -> Report:
    made = refusal(logged(), Culprit(name, "cgroup", 1000))
    return Report(
        made.type,
        made.layer,
        made.kind,
        target,
        1,
        name,
        made.effect,
        made.rule,
        made.reason,
        attributes=made.attributes,
    )


def test_the_first_is_reported_at_once_and_its_repeats_once() -> None:
    told: list[Report] = []
    merger = Merger(told.append)
    for i in range(100):
        merger.take(report_of("x"), 0.01 * i)
    assert [r.count for r in told] == [1]
    merger.flush(refusals.MERGE_SECONDS + 1)
    assert [r.count for r in told] == [1, 99]
    merger.take(report_of("x"), 100.0)
    assert [r.count for r in told] == [1, 99, 1]


def test_different_targets_and_runs_are_told_apart() -> None:
    told: list[Report] = []
    merger = Merger(told.append)
    for target, name in (("x", "a"), ("y", "a"), ("x", "b")):
        merger.take(report_of(target, name), 0.0)
    assert len(told) == 3


def test_a_scan_of_many_targets_makes_few_records_and_counts_all() -> None:
    told: list[Report] = []
    merger = Merger(told.append)
    for i in range(10_000):
        merger.take(report_of(f"t{i}"), 0.0001 * i)
    merger.take(report_of("t", "quiet"), 1.0)
    merger.flush_all()
    assert sum(r.count for r in told) == 10_001
    assert len(told) <= refusals.TARGETS_PER_RUN + 4
    assert "t" in {r.target for r in told if r.run == "quiet"}


def test_many_runs_at_once_stay_within_the_limit() -> None:
    told: list[Report] = []
    merger = Merger(told.append)
    for i in range(3 * refusals.MERGE_LIMIT):
        merger.take(report_of(f"t{i}", f"run{i % 50}"), 0.0)
    assert len(merger._open) <= refusals.MERGE_LIMIT + 50
    merger.flush_all()
    assert sum(r.count for r in told) == 3 * refusals.MERGE_LIMIT


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.floats(0, 20, allow_nan=False)),
        max_size=300,
    )
)
def test_no_refusal_is_lost_in_merging(events: list[tuple[str, int, float]]) -> None:
    told: list[Report] = []
    merger = Merger(told.append)
    for name, target, now in sorted(events, key=lambda e: e[2]):
        merger.take(report_of(str(target), name), now)
    merger.flush_all()
    for name in "abc":
        assert sum(r.count for r in told if r.run == name) == sum(e[0] == name for e in events)
    assert not merger._open and not merger._targets


def test_packets_that_were_counted_but_never_read_have_a_number() -> None:
    account = Account()
    account.read(7)
    assert account.missing(10) == 3
    assert account.missing(10) == 0
    account.read(2)
    assert account.missing(12) == 0


def test_packets_read_after_the_count_was_taken_are_not_missing_later() -> None:
    account = Account()
    account.read(5)
    assert account.missing(3) == 0
    assert account.missing(5) == 0


def test_new_rules_count_from_zero() -> None:
    account = Account()
    account.read(5)
    account.reset()
    assert account.missing(2) == 2


def test_the_account_outlives_the_process(tmp_path: Path) -> None:
    account = Account(tmp_path / "refused-ip")
    account.load()
    account.read(41)
    account.save()
    later = Account(tmp_path / "refused-ip")
    later.load()
    assert later.missing(42) == 1


@pytest.mark.parametrize("text", ["", "x", "-5"])
def test_a_damaged_account_counts_too_much_rather_than_too_little(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "refused-ip").write_text(text)
    account = Account(tmp_path / "refused-ip")
    account.load()
    assert account.missing(42) == 42
