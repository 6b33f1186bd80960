"""Merging, holding, the ledger and the tables: bounded, and nothing lost without a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.config import Listen
from aa.ebpf import events, tables
from aa.ebpf.canary import judge
from aa.ebpf.ledger import SAMPLES, Gap, Ledger
from aa.ebpf.merge import Hold, Merged, Merger, RecentRuns
from aa.ebpf.reports import GUARD_RULE, equal_key, to_report
from aa.ebpf.tables import Config, Count, proxy_ends
from aa.ebpf.told import _new
from aa.model import Effect, Kind, RecordType
from tests.unit import ebpf_records as make


def test_equal_events_of_a_window_become_one() -> None:
    merger: Merger[str] = Merger(window=1.0)
    for n, at in enumerate((0.0, 0.1, 0.9)):
        assert merger.add("k", f"e{n}", 1, at) is None
    assert list(merger.due(0.99)) == []
    (merged,) = merger.due(1.0)
    assert (merged.first, merged.last, merged.count) == ("e0", "e2", 3)
    assert len(merger) == 0


def test_a_full_merger_lets_go_of_its_oldest() -> None:
    merger: Merger[int] = Merger(window=1.0, limit=2)
    assert merger.add("a", 1, 1, 0) is None
    assert merger.add("b", 2, 1, 0) is None
    gone = merger.add("c", 3, 1, 0)
    assert gone is not None and gone.first == 1
    assert len(merger) == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9))), st.integers(1, 4))
def test_a_merger_keeps_every_count(adds: list[tuple[int, int]], limit: int) -> None:
    merger: Merger[int] = Merger(window=1.0, limit=limit)
    out = []
    for now, (key, count) in enumerate(adds):
        full = merger.add(key, key, count, now / 3)
        out += [full] if full else []
        out += merger.due(now / 3)
        assert len(merger) <= limit
    out += merger.due(float("inf"))
    assert sum(m.count for m in out) == sum(count for _, count in adds)


def test_held_events_come_when_their_run_is_known_or_their_time_is_up() -> None:
    hold: Hold[str] = Hold(seconds=2.0)
    hold.add(1, "a", 0.0)
    hold.add(2, "b", 0.5)
    hold.add(1, "c", 1.0)
    assert hold.ready({1}.__contains__, 1.0) == ["a", "c"]
    assert hold.ready(set().__contains__, 2.4) == []
    assert hold.ready(set().__contains__, 2.5) == ["b"]
    assert len(hold) == 0


def test_a_full_hold_lets_go_of_its_oldest() -> None:
    hold: Hold[str] = Hold(limit=2)
    assert [hold.add(1, x, 0.0) for x in "abc"] == [None, None, "a"]


def test_ended_runs_are_remembered_for_a_while_and_not_too_many() -> None:
    recent: RecentRuns[str] = RecentRuns(seconds=10.0, limit=2)
    recent.add(1, "r1", 0.0)
    recent.add(2, "r2", 1.0)
    recent.add(3, "r3", 2.0)
    assert [recent.get(n) for n in (1, 2, 3)] == [None, "r2", "r3"]
    recent.add(4, "r4", 20.0)
    assert [recent.get(n) for n in (2, 3, 4)] == [None, None, "r4"]


def test_what_the_ring_lost_is_a_gap_at_once_and_only_once() -> None:
    ledger = Ledger()
    assert ledger.gaps({1: Count(lost=5)}, idle=False) == [Gap(1, 5, "the ring was full")]
    assert ledger.gaps({1: Count(lost=5)}, idle=False) == []
    assert ledger.gaps({1: Count(lost=6)}, idle=False)[0].count == 1


def test_events_that_nobody_read_are_a_gap_after_several_looks() -> None:
    ledger = Ledger()
    ledger.read(1, events=10)
    looks = [ledger.gaps({1: Count(events=13)}, idle=True) for _ in range(SAMPLES)]
    assert looks == [[]] * (SAMPLES - 1) + [[Gap(1, 3, "a reader ended with events in its hands")]]
    assert ledger.gaps({1: Count(events=13)}, idle=True) == []


def test_events_that_are_only_late_are_no_gap() -> None:
    ledger = Ledger()
    for _ in range(10):
        ledger.gaps({1: Count(events=5)}, idle=True)
        ledger.read(1, events=5)
        assert ledger.gaps({1: Count(events=5)}, idle=True) == []
        ledger = Ledger({1: Count()})


def test_a_busy_ring_is_not_judged() -> None:
    ledger = Ledger()
    for _ in range(10):
        assert ledger.gaps({1: Count(events=13)}, idle=False) == []


def test_a_new_service_goes_on_from_what_was_reported_not_from_what_was_read() -> None:
    first = Ledger()
    first.read(1, events=10)
    first.report(1, events=3)
    first.settle()
    first.report(1, events=2)  # the gateway has not answered for these
    first.dismiss(1, events=1)
    second = Ledger(first.settled)
    gaps = [second.gaps({1: Count(events=10)}, idle=True) for _ in range(SAMPLES)]
    assert gaps[-1][0].count == 6


@pytest.mark.parametrize(("total", "told", "new"), [(5, 0, 5), (5, 3, 2), (5, 5, 0), (2, 9, 2)])
def test_a_tally_that_began_again_counts_from_nothing(total: int, told: int, new: int) -> None:
    assert _new(total, told) == new


def test_config_and_counts_survive_packing() -> None:
    config = Config(slice=2**63 + 1, level=3, pidns=4026531836, generation=7, canary=2**40)
    assert Config.unpack(config.pack()) == config
    per_cpu = Count(1, 2, 3).pack() + Count(10, 20, 30).pack()
    assert Count.sum_of(per_cpu) == Count(11, 22, 33)


def test_the_proxys_ends_are_loopback_alone() -> None:
    ends = proxy_ends()
    assert all(end.address.is_loopback for end in ends)
    assert {str(end) for end in ends} == {
        "127.0.0.1:8898/tcp",
        "[::1]:8898/tcp",
        "127.0.0.1:8899/tcp",
        "127.0.0.1:8853/tcp",
        "127.0.0.1:8853/udp",
        "[::1]:8853/tcp",
        "[::1]:8853/udp",
    }
    assert len({end.pack() for end in ends}) == len(ends)
    assert {len(end.pack()) for end in ends} == {tables.END_SIZE}


def test_another_explicit_listener_takes_the_place_of_the_first() -> None:
    ends = {
        str(end) for end in proxy_ends(Listen(explicit_address="127.0.0.2", explicit_port=3128))
    }
    assert "127.0.0.2:3128/tcp" in ends and "127.0.0.1:8899/tcp" not in ends


@pytest.mark.parametrize(
    ("address", "port"),
    [("0.0.0.0", 8899), ("10.0.0.1", 80), ("127.0.0.1", 0), ("::1", 1), ("x", 1), ("", 1)],
)
def test_a_listener_that_is_not_on_loopback_is_refused(address: str, port: int) -> None:
    with pytest.raises(ValueError):
        proxy_ends(Listen(explicit_address=address, explicit_port=port))


def merged(record: bytes, count: int = 1) -> Merged[events.Event]:
    event = events.decode(record)
    return Merged(event, event, count, 0.0)


def test_an_exec_becomes_a_report() -> None:
    report = to_report(merged(make.exec_record(), 3), run="r", program="", boot=10**18)
    assert (report.type, report.kind, report.target) == (
        RecordType.OBSERVED,
        Kind.EXEC,
        "/bin/echo",
    )
    assert report.time == 10**18 + 5_000_000_000
    assert report.count == 3
    assert report.effect is None
    assert report.attributes["argv"] == ["echo", "hi"]
    assert report.attributes["until"] == report.time


def test_an_exit_by_signal_becomes_a_report() -> None:
    report = to_report(merged(make.exit_record(9)), run="r", program="/bin/x", boot=0)
    assert (report.kind, report.target) == (Kind.EXIT, "/bin/x")
    assert report.attributes["signal"] == "SIGKILL" and "code" not in report.attributes


def test_a_refusal_becomes_a_denial_with_rule_and_reason() -> None:
    record = make.net_record(make.key(reason=events.REFUSED_END), total=4, refused=True)
    report = to_report(merged(record, 4), run="r", program="", boot=0)
    assert (report.type, report.effect, report.rule) == (
        RecordType.REFUSAL,
        Effect.DENY,
        GUARD_RULE,
    )
    assert report.reason and report.target == "192.0.2.1:443" and report.count == 4
    assert report.as_json()["attributes"]["protocol"] == "tcp"


def test_every_refusal_has_a_reason_in_words() -> None:
    assert set(events.REASONS) == {1, 2, 3, 4, 5, 6}


def test_equal_means_equal_in_all_but_time_and_process() -> None:
    one = events.decode(make.exec_record())
    assert equal_key(one, "") == equal_key(events.decode(make.exec_record()), "")
    other = events.decode(make.exec_record(argv=b"echo\0ho\0"))
    assert equal_key(one, "") != equal_key(other, "")
    elsewhere = events.decode(make.exec_record(cgroup=78))
    assert equal_key(one, "") != equal_key(elsewhere, "")


GOOD_CANARY = {"refused": 1, "allowed": 0, "sockets": {"raw": 1, "mptcp": 93}}
COUNTED = {(events.REFUSED_END, 9): 1, (events.REFUSED_SOCKET, 262): 1}


def test_a_canary_that_was_refused_by_us_is_proof() -> None:
    assert list(judge(GOOD_CANARY, {}, COUNTED)) == []


@pytest.mark.parametrize(
    ("tried", "after", "why"),
    [
        ({**GOOD_CANARY, "refused": 0}, COUNTED, "let through"),
        ({**GOOD_CANARY, "allowed": 1}, COUNTED, "proxy's own end was refused"),
        ({**GOOD_CANARY, "sockets": {"raw": 0}}, COUNTED, "a socket of kind raw was made"),
        (GOOD_CANARY, {}, "refused by something else"),
        (GOOD_CANARY, {(events.REFUSED_END, 9): 1}, "no socket was refused by the guard"),
    ],
)
def test_a_canary_that_shows_less_is_no_proof(
    tried: dict[str, object], after: dict[tuple[int, int], int], why: str
) -> None:
    assert any(why in said for said in judge(tried, {}, after))


def test_counts_of_an_earlier_canary_are_no_proof() -> None:
    assert list(judge(GOOD_CANARY, COUNTED, COUNTED))
