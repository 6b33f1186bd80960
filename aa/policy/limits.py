"""Limits of a policy: how much of something a run, an agent, a user or the host may use in a window.

Pure: what was used is kept by the gateway.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aa.model import Mode, Run
from aa.policy.pattern import glob
from aa.tomlfile import Document, KeyPath, Problem

Json = Any


class Per(enum.StrEnum):
    """Whose use is counted together."""

    RUN = "run"
    AGENT = "agent"
    USER = "user"
    HOST = "host"


class Measure(enum.StrEnum):
    """What is counted, and in which window. The names are the keys of a policy."""

    CALLS_PER_MINUTE = "per_minute"
    BYTES_OUT_PER_HOUR = "bytes_out_per_hour"
    BYTES_OUT_PER_DAY = "bytes_out_per_day"
    TOKENS_PER_HOUR = "tokens_per_hour"
    USD_PER_DAY = "usd_per_day"


SECTION = {
    Measure.CALLS_PER_MINUTE: "tool",
    Measure.BYTES_OUT_PER_HOUR: "network",
    Measure.BYTES_OUT_PER_DAY: "network",
    Measure.TOKENS_PER_HOUR: "llm",
    Measure.USD_PER_DAY: "llm",
}
WINDOW_SECONDS = {
    Measure.CALLS_PER_MINUTE: 60,
    Measure.BYTES_OUT_PER_HOUR: 3600,
    Measure.BYTES_OUT_PER_DAY: 86400,
    Measure.TOKENS_PER_HOUR: 3600,
    Measure.USD_PER_DAY: 86400,
}
"""Windows begin at full minutes, hours and days of UTC."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One measure of one [[limit]]."""

    ref: str  # POLICY-ID/LIMIT-ID
    per: Per
    measure: Measure
    most: float
    mode: Mode
    names: tuple[str, ...] = ()
    """Of tools, as written; empty for other measures."""
    tests: tuple[Callable[[str], bool], ...] = ()

    @property
    def is_about_models(self) -> bool:
        return SECTION[self.measure] == "llm"

    def is_about_tool(self, name: str) -> bool:
        return any(test(name) for test in self.tests)

    def subject(self, run: Run) -> str:
        """Whose counter a run uses."""
        match self.per:
            case Per.RUN:
                return run.id
            case Per.AGENT:
                return run.agent
            case Per.USER:
                return run.user
        return ""

    def window(self, now: float) -> int:
        """When the window of this moment began, in seconds since the epoch."""
        size = WINDOW_SECONDS[self.measure]
        return int(now) // size * size

    def resets(self, now: float) -> int:
        return self.window(now) + WINDOW_SECONDS[self.measure]

    def as_json(self) -> dict[str, Json]:
        return {
            "ref": self.ref,
            "per": self.per.value,
            "measure": self.measure.value,
            "most": self.most,
            "names": list(self.names),
            "mode": self.mode.value,
        }


def limits_of(document: Document, policy: str, mode: Mode, problems: list[Problem]) -> list[Limit]:
    """The limits of a file that fits the schema; what is wrong all the same goes to `problems`."""
    found: list[Limit] = []
    seen: set[str] = set()
    for index, written in enumerate(document.data.get("limit", ())):
        path: KeyPath = ("limit", index)
        if written["id"] in seen:
            message = f"{written['id']!r} is the id of a limit before it too"
            problems.append(document.problem((*path, "id"), message, "give it another"))
        seen.add(written["id"])
        sections = [name for name in ("tool", "network", "llm") if name in written]
        if len(sections) != 1:
            message = "limits two things" if sections else "limits nothing"
            fix = "each limit has one of tool = {...}, network = {...}, llm = {...}"
            problems.append(document.problem(path, message, fix))
            continue
        found += _measures(written, sections[0], policy, mode)
    return found


def _measures(
    written: Mapping[str, Json], section: str, policy: str, mode: Mode
) -> Iterator[Limit]:
    table = written[section]
    names: Sequence[str] = table.get("names", ())
    for measure, its_section in SECTION.items():
        if its_section == section and measure.value in table:
            yield Limit(
                ref=f"{policy}/{written['id']}",
                per=Per(written["per"]),
                measure=measure,
                most=float(table[measure.value]),
                mode=mode,
                names=tuple(names),
                tests=tuple(glob(name) for name in names),
            )
