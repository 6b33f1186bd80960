"""When a rule holds: days and hours on the wall clock of a time zone. Pure: the time is given.

A week is a row of bits, one for each minute from Monday 0:00 on, so a rule that can
never hold is found when it is read.
"""

from __future__ import annotations

import datetime
import re
import zoneinfo
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aa.tomlfile import did_you_mean

Json = Any

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = 24 * 60
WEEK = 7 * DAY
ALWAYS = (1 << WEEK) - 1

_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-(?:([01][0-9]|2[0-3]):([0-5][0-9])|(24:00))")

Tell = Callable[[tuple[str | int, ...], str, str], None]
"""Takes the place of a problem within `when`, what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes of a week on the clock of a zone."""

    zone: datetime.tzinfo
    minutes: int  # bit n stands for minute n from Monday 0:00

    def holds(self, now: float) -> bool | None:
        """None for a time that no calendar has."""
        try:
            at = datetime.datetime.fromtimestamp(now, self.zone)
        except (ValueError, OverflowError, OSError):
            return None
        return bool(self.minutes >> (at.weekday() * DAY + at.hour * 60 + at.minute) & 1)


@dataclass(frozen=True, slots=True)
class When:
    """Holds within `inside` and not within `outside`; one of them may be absent."""

    inside: Window | None
    outside: Window | None

    def holds(self, now: float, *, against: bool) -> bool:
        """`against` is the answer for a time that cannot be read."""
        for window, wanted in ((self.inside, True), (self.outside, False)):
            if window is not None:
                found = window.holds(now)
                if found is None:
                    return against
                if found is not wanted:
                    return False
        return True

    @property
    def always(self) -> bool:
        return self.outside is None and self.inside is not None and self.inside.minutes == ALWAYS


def read(written: Mapping[str, Json], tell: Tell) -> When | None:
    """A `when` table that fits the schema. Tells every problem; None if there was one."""
    problems: list[str] = []

    def note(path: tuple[str | int, ...], message: str, fix: str) -> None:
        problems.append(message)
        tell(path, message, fix)

    inverse = written.get("not")
    if not {"days", "hours", "not"} & written.keys():
        note((), "has neither days nor hours", "a timezone alone says nothing")
    if inverse is not None and not {"days", "hours"} & inverse.keys():
        note(("not",), "has neither days nor hours", "a timezone alone says nothing")
    name = written.get("timezone", "UTC")
    zone = _zone(name, ("timezone",), note)
    inside = outside = None
    if "days" in written or "hours" in written:
        inside = Window(zone, _minutes(written, (), note))
    other = name
    if inverse is not None:
        other = inverse.get("timezone", name)
        outside = Window(_zone(other, ("not", "timezone"), note), _minutes(inverse, ("not",), note))
    if problems:
        return None
    if outside is not None:
        left = (
            inside.minutes if inside is not None and other == name else ALWAYS
        ) & ~outside.minutes
        if not left:
            note((), "can never hold: its not takes all of it away", "correct it")
            return None
    return When(inside, outside)


def _zone(name: str, path: tuple[str | int, ...], note: Tell) -> datetime.tzinfo:
    if name == "UTC":
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        fix = did_you_mean(name, zoneinfo.available_timezones())
        fix = fix if fix.startswith("did") else "write one such as Europe/Berlin, or UTC"
        note(path, f"{name!r} is not a time zone that this host knows", fix)
        return datetime.UTC


def _minutes(written: Mapping[str, Json], path: tuple[str | int, ...], note: Tell) -> int:
    days: set[int] = set()
    for index, text in enumerate(_texts(written.get("days", DAYS))):
        days |= _days(text, (*path, "days", index), note)
    spans: list[tuple[int, int]] = []
    for index, text in enumerate(_texts(written.get("hours", "00:00-24:00"))):
        span = _span(text, (*path, "hours", index), note)
        if span is not None:
            spans.append(span)
    found = 0
    for day in days:
        for begin, length in spans:
            first = day * DAY + begin
            row = ((1 << length) - 1) << first
            found |= row & ALWAYS | row >> WEEK  # Sunday night ends on Monday
    return found


def _texts(value: str | list[str] | tuple[str, ...]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _days(text: str, path: tuple[str | int, ...], note: Tell) -> set[int]:
    """`mon`, or `fri-mon`: from one to the other, over Sunday if need be."""
    first, dash, last = text.partition("-")
    for name in (first, last) if dash else (first,):
        if name not in DAYS:
            note(path, f"{text!r} is not a day", f"write {', '.join(DAYS)}, or two as in mon-fri")
            return set()
    begin, end = DAYS.index(first), DAYS.index(last if dash else first)
    return {(begin + n) % 7 for n in range((end - begin) % 7 + 1)}


def _span(text: str, path: tuple[str | int, ...], note: Tell) -> tuple[int, int] | None:
    """Minute of the day where it begins, and its length; one that ends earlier ends tomorrow."""
    found = _HOURS.fullmatch(text)
    if found is None:
        note(path, f"{text!r} is not a span of hours", 'write it as in "09:00-18:00"')
        return None
    begin = int(found[1]) * 60 + int(found[2])
    end = DAY if found[5] else int(found[3]) * 60 + int(found[4])
    if begin == end:
        note(path, f"{text!r} begins where it ends", "leave hours out for the whole day")
        return None
    return begin, (end - begin) % DAY or DAY
