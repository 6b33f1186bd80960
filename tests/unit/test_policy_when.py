"""Times at which rules hold, against the calendar."""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa.policy.when import DAYS, When, read

Told = list[tuple[tuple[str | int, ...], str, str]]


def when(**written: Any) -> When:
    told: Told = []
    found = read(written, lambda *problem: told.append(problem))
    assert found is not None, told
    return found


def problem(written: dict[str, Any]) -> tuple[tuple[str | int, ...], str, str]:
    told: Told = []
    assert read(written, lambda *found: told.append(found)) is None
    return told[0]


def at(text: str, zone: str = "UTC") -> float:
    moment = datetime.datetime.fromisoformat(text)
    return moment.replace(tzinfo=zoneinfo.ZoneInfo(zone)).timestamp()


def test_days_are_those_of_the_zone() -> None:
    monday = when(days=["mon"], timezone="Pacific/Auckland")
    assert monday.holds(at("2026-01-05T00:00", "Pacific/Auckland"), against=False)
    assert monday.holds(at("2026-01-04T12:00"), against=False)  # Sunday noon in London
    assert not monday.holds(at("2026-01-05T12:00"), against=False)


def test_an_hour_that_happens_twice_is_in_the_span_twice_and_one_that_is_left_out_never() -> None:
    early = when(hours="02:00-03:00", timezone="Europe/Berlin")
    twice = at("2026-10-25T02:30", "Europe/Berlin")  # summer time ends
    assert early.holds(twice, against=False) and early.holds(twice + 3600, against=False)
    before = at("2026-03-29T01:59:59", "Europe/Berlin")  # summer time begins
    assert not any(early.holds(before + n, against=False) for n in (0, 1, 2, 1800, 3601))


@settings(max_examples=200)
@given(
    st.sets(st.sampled_from(DAYS), min_size=1),
    st.integers(0, 23 * 60),
    st.integers(1, 24 * 60 - 1),
    st.integers(0, 2 * 7 * 24 * 60),
)
def test_a_span_begins_on_its_days_and_lasts_as_long_as_it_says(
    days: set[str], begin: int, length: int, offset: int
) -> None:
    end = (begin + length) % (24 * 60)
    hours = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    found = when(days=sorted(days), hours=hours)
    monday = int(at("2026-01-05T00:00"))
    starts = [
        monday + (week * 7 + n) * 86400 + begin * 60
        for week in (-1, 0, 1, 2)
        for n, day in enumerate(DAYS)
        if day in days
    ]
    moment = monday + offset * 60
    expected = any(start <= moment < start + length * 60 for start in starts)
    assert found.holds(moment, against=False) is expected


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_number_is_a_time_or_counts_against(now: float) -> None:
    always = when(days=["mon-sun"])
    assert always.always
    assert always.holds(now, against=True)
    assert when(hours="10:00-11:00").holds(float("nan"), against=True)
    assert not when(hours="10:00-11:00").holds(float("inf"), against=False)


@pytest.mark.parametrize(
    ("written", "key", "words"),
    [
        ({"timezone": "UTC"}, (), "neither days nor hours"),
        ({"not": {"timezone": "UTC"}}, ("not",), "neither days nor hours"),
        ({"days": ["monday"]}, ("days", 0), "'monday' is not a day"),
        ({"days": ["mon", "tue-"]}, ("days", 1), "'tue-' is not a day"),
        ({"days": ["mon-fri-sun"]}, ("days", 0), "is not a day"),
        ({"hours": "9-18"}, ("hours", 0), "not a span"),
        ({"hours": "09:00-24:01"}, ("hours", 0), "not a span"),
        ({"hours": "24:00-01:00"}, ("hours", 0), "not a span"),
        ({"hours": ["09:00-10:00", "09:00-09:00"]}, ("hours", 1), "begins where it ends"),
        ({"days": ["mon"], "timezone": "Mars/Olympus"}, ("timezone",), "not a time zone"),
        ({"days": ["mon"], "timezone": "../etc/passwd"}, ("timezone",), "not a time zone"),
        ({"days": ["mon"], "timezone": "Europe"}, ("timezone",), "not a time zone"),
        ({"not": {"days": ["mon"], "timezone": "x"}}, ("not", "timezone"), "not a time zone"),
        ({"not": {"days": ["mon-sun"]}}, (), "can never hold"),
        ({"days": ["mon"], "not": {"days": ["mon-tue"]}}, (), "can never hold"),
        ({"hours": "09:00-10:00", "not": {"hours": "08:00-11:00"}}, (), "can never hold"),
    ],
)
def test_times_that_mean_nothing_are_errors(
    written: dict[str, Any], key: tuple[str | int, ...], words: str
) -> None:
    path, message, fix = problem(written)
    assert path == key
    assert words in message
    assert fix


def test_a_zone_that_is_nearly_right_is_proposed() -> None:
    assert problem({"days": ["mon"], "timezone": "Europe/Belrin"})[2] == (
        "did you mean 'Europe/Berlin'?"
    )
