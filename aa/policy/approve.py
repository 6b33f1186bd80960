"""Who may approve what a rule asks about, how long is waited, and how long an approval holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Json = Any

DEFAULT_APPROVERS = ("group:aa-operators",)
DEFAULT_SECONDS = 600.0
LONGEST_SECONDS = 7 * 86400.0

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DURATION = re.compile(r"([1-9][0-9]{0,6})([smhd])")


@dataclass(frozen=True, slots=True)
class Approve:
    """`by` are users and groups, as in `user:ann` and `group:aa-operators`; any one of them will do."""

    by: tuple[str, ...] = DEFAULT_APPROVERS
    timeout: float = DEFAULT_SECONDS
    """Seconds that are waited; then the answer is deny."""
    remember: str = "once"
    """`once`: the approval is used up by what it was asked for. `run`: the same action of the same
    run is not asked about again."""

    def as_json(self) -> dict[str, Json]:
        return {"by": list(self.by), "timeout": self.timeout, "remember": self.remember}


def read(written: Mapping[str, Json], tell: Callable[[str, str, str], None]) -> Approve:
    """An `approve` table that fits the schema. `tell` takes a key, what is wrong, what to do."""
    seconds = DEFAULT_SECONDS
    if "timeout" in written:
        found = DURATION.fullmatch(written["timeout"])
        assert found is not None  # the schema has the same pattern
        seconds = float(int(found[1]) * UNITS[found[2]])
        if seconds > LONGEST_SECONDS:
            tell("timeout", f"{written['timeout']} is longer than a week", "shorten it")
    by = tuple(written.get("by", DEFAULT_APPROVERS))
    return Approve(by, seconds, written.get("remember", "once"))
