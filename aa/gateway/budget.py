"""What one run may cost all others: decisions a second, and bytes of the audit log.

Both are buckets that fill up steadily. What is over is refused or, where it happened already,
counted; `Budgets.over` hands out the counts once in a while, so that no flood is silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

AUDIT_BURST_SECONDS = 60.0
"""How much of the audit budget a run that was quiet may use at once."""


@dataclass
class Bucket:
    """Fills with `rate` a second up to `size`. What is taken may leave it in debt."""

    rate: float
    size: float
    left: float
    at: float

    @classmethod
    def full(cls, rate: float, size: float, now: float) -> Bucket:
        return cls(rate, size, size, now)

    def take(self, amount: float, now: float, *, at_least: float = 0.0) -> bool:
        """Takes it and says True, or says False when less than `at_least` is there."""
        self.left = min(self.size, self.left + (now - self.at) * self.rate)
        self.at = now
        if self.left < at_least:
            return False
        self.left -= amount
        return True


@dataclass
class Spent:
    """One run's buckets, and what they refused since they were last asked."""

    decisions: Bucket
    audit: Bucket
    limits: tuple[float, float]
    refused: int = 0
    refused_for_audit: int = 0
    not_recorded: int = 0


class Budgets:
    """The budgets of all runs. `limits` says decisions and audit bytes a second, as they are now:
    another tuple when they changed, and the same one while they did not."""

    def __init__(
        self,
        limits: Callable[[], tuple[float, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._spent: dict[str, Spent] = {}

    def _of(self, run: str) -> Spent:
        limits = self._limits()
        spent = self._spent.get(run)
        if spent is None:
            decisions, audit = limits
            now = self._clock()
            spent = self._spent[run] = Spent(
                Bucket.full(decisions, decisions, now),
                Bucket.full(audit, audit * AUDIT_BURST_SECONDS, now),
                limits,
            )
        elif spent.limits is not limits:  # a reload
            decisions, audit = spent.limits = limits
            spent.decisions.rate = spent.decisions.size = decisions
            spent.audit.rate, spent.audit.size = audit, audit * AUDIT_BURST_SECONDS
        return spent

    def refusal(self, run: str) -> str:
        """Takes one decision. The limit that refuses it, counted, or ""."""
        spent, now = self._of(run), self._clock()
        if not spent.decisions.take(1, now, at_least=1):
            spent.refused += 1
            return "decisions_per_second"
        if not spent.audit.take(0, now):
            spent.refused_for_audit += 1
            return "audit_bytes_per_second"
        return ""

    def over_rate(self, run: str) -> bool:
        """Takes one decision; True, and counted as refused, when there is none left."""
        spent = self._of(run)
        if spent.decisions.take(1, self._clock(), at_least=1):
            return False
        spent.refused += 1
        return True

    def over_audit(self, run: str, *, happened: bool = False) -> bool:
        """Whether its records cost too much already. Counted, as refused or as not recorded."""
        spent = self._of(run)
        if spent.audit.take(0, self._clock()):
            return False
        if happened:
            spent.not_recorded += 1
        else:
            spent.refused_for_audit += 1
        return True

    def recorded(self, run: str, size: int) -> None:
        """So many bytes of the log were this run's."""
        self._of(run).audit.left -= size

    def over(self) -> list[tuple[str, Spent]]:
        """The runs that were over a budget since the last call; their counts begin anew."""
        found = []
        for run, spent in self._spent.items():
            if spent.refused or spent.refused_for_audit or spent.not_recorded:
                found.append((run, Spent(**vars(spent))))
                spent.refused = spent.refused_for_audit = spent.not_recorded = 0
        return found

    def forget_all_but(self, known: Callable[[str], bool]) -> None:
        for run in [r for r in self._spent if not known(r)]:
            del self._spent[run]
