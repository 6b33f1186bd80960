"""Asks a policy once more what the audit log says that agents did. Pure: records in, answers out.

A record holds what the gateway was asked, so it can be asked again, of another policy too. What a
record does not hold (attributes that were too large, the run of a record whose beginning is not in
the log) makes it one that cannot be replayed; those are counted, and by why.
"""

from __future__ import annotations

import datetime
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aa.model import DECIDED, Action, Decision, Effect, Kind, Layer, RecordType, Report, Run
from aa.policy.engine import Policy

Json = Any
Record = Mapping[str, Json]

SEEN = (Kind.EXEC, Kind.FILE_OPEN, Kind.FILE_UNLINK, Kind.FILE_RENAME)
"""What the kernel layer sees and nobody is asked about: a policy can be asked afterwards."""
PERSON = "user/"
"""The runs of people who use the explicit proxy port: they have no beginning and no tags."""
CUT = "…"
"""How the log ends a target that was too long for it."""

NO_RECORD = "a line that is no record"
OMITTED = "its attributes were too large for the log"
CUT_TARGET = "its target was too long for the log"
NO_RUN = "the beginning of its run is not in the log, so its tags, home and directory are not known"
NOT_ASKED = "refused by kernel or firewall, which asked no policy"
UNKNOWN_KIND = "a kind of action that this version does not know"
NO_PATH = "its path is not known in full"
NO_SUBJECT = "nobody's: it belongs to no known run"

_LENIENCE = (Effect.DENY, Effect.ASK, Effect.ALLOW)


@dataclass(frozen=True, slots=True)
class Question:
    """What the gateway was asked, or the kernel layer saw: `count` times, the first at `now`."""

    run: Run
    action: Action
    now: float
    count: int
    seen: bool
    """Nothing was decided when it happened."""
    effect: Effect
    """What was answered; allow for what was only seen."""
    rule: str
    would: Effect | None
    told: Mapping[str, Json] = field(default_factory=dict)
    """Everything that the record says of the act."""


class _LeftOut(Exception):
    """The record cannot be replayed; the message is one of the reasons above."""


@dataclass
class Replay:
    """Makes questions of records, which it gets oldest first."""

    policies: tuple[Policy, ...] = ()
    """Those that will be asked: what of a run must be known depends on them."""
    runs: dict[str, Run] = field(default_factory=dict)
    """Runs whose beginning was in the log."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records that cannot be replayed, by why."""

    def questions(self, records: Iterable[Record | None]) -> Iterator[Question]:
        """In the order of the records. Raises nothing: a record that is odd is left out."""
        for record in records:
            count = 1
            try:
                if record is None or not _is_record(record):
                    raise _LeftOut(NO_RECORD)
                count = record["count"]
                question = self._question(record)
            except _LeftOut as e:
                self.left_out[str(e)] += count
            except (KeyError, TypeError, ValueError, AttributeError):
                self.left_out[NO_RECORD] += count
            else:
                if question is not None:
                    yield question

    def _question(self, record: Record) -> Question | None:
        type_, kind = RecordType(record["type"]), record["kind"]
        if kind == Kind.RUN.value:
            self._learn_run(record)
            return None
        if type_ is RecordType.REFUSAL:
            raise _LeftOut(NOT_ASKED)
        decided = type_ is RecordType.DECISION
        if not decided and not _is_seen(record):
            return None
        if kind not in {k.value for k in Kind}:
            raise _LeftOut(UNKNOWN_KIND)
        return self._asked(record, Kind(kind), seen=not decided) if kind in DECIDED else None

    def _asked(self, record: Record, kind: Kind, *, seen: bool) -> Question:
        if record["attributes"].keys() == {"omitted"}:
            raise _LeftOut(OMITTED)
        if record["target"].endswith(CUT):
            raise _LeftOut(CUT_TARGET)
        return Question(
            run=self._run(record, kind),
            action=_action(record, kind, seen=seen),
            now=moment(record["time"]),
            count=record["count"],
            seen=seen,
            effect=Effect(record["decision"]) if record["decision"] else Effect.ALLOW,
            rule=record["rule"],
            would=Effect(record["would"]) if record["would"] else None,
            told=record["attributes"],
        )

    def _run(self, record: Record, kind: Kind) -> Run:
        if record["uid"] < 0:
            raise _LeftOut(NO_SUBJECT)
        run = self.runs.get(record["run"])
        if run is not None:
            return run
        if self._needs_run(kind) and not record["run"].startswith(PERSON):
            raise _LeftOut(NO_RUN)
        return Run(record["run"], record["agent"], record["user"], record["uid"])

    def _learn_run(self, record: Record) -> None:
        told = record["attributes"]
        if "directory" not in told:
            return  # its end, or a pause
        if not {"home", "tags"} <= told.keys():
            return  # an earlier version did not write them
        self.runs[record["run"]] = Run(
            id=record["run"],
            agent=record["agent"],
            user=record["user"],
            uid=record["uid"],
            home=str(told["home"]),
            layers=frozenset(Layer(x) for x in told["layers"]),
            tags=tuple(str(x) for x in told["tags"]),
            directory=str(told["directory"]),
            argv=tuple(str(x) for x in told["argv"]),
        )

    def _needs_run(self, kind: Kind) -> bool:
        """Whether the answer may depend on what only the record of a run's beginning says."""
        if kind in SEEN:
            return True
        return any(f.applies_to.tags for policy in self.policies for f in policy.files)


def _action(record: Record, kind: Kind, *, seen: bool) -> Action:
    if not seen:
        return Action(kind, record["target"], record["attributes"])
    action = _seen_action(kind, record["target"], record["attributes"])
    if action is None:
        raise _LeftOut(NO_PATH)
    return action


TEXTS = (
    "type", "layer", "kind", "target", "decision", "rule", "would", "agent", "run", "user", "time",
)  # fmt: skip


def _is_record(record: Record) -> bool:
    """Whether it has the fields of a record of ours, each of its type."""
    return (
        all(isinstance(record.get(name), str) for name in TEXTS)
        and all(type(record.get(name)) is int for name in ("uid", "count"))
        and record["count"] > 0
        and isinstance(record.get("attributes"), dict)
    )


def seen_action(report: Report) -> Action | None:
    """What the kernel layer saw, as something to ask a policy about; None for what is no such thing."""
    if report.layer is not Layer.KERNEL or report.type is not RecordType.OBSERVED:
        return None
    return _seen_action(report.kind, report.target, report.attributes)


def _seen_action(kind: Kind, target: str, attributes: Mapping[str, Json]) -> Action | None:
    """By the path's text: `..` is taken out of it, and a part that is missing makes it none."""
    if kind not in SEEN or not target.startswith("/"):
        return None
    told: dict[str, Json] = {}
    if kind is Kind.FILE_OPEN:
        told["access"] = "read" if attributes.get("access") == "read" else "write"
    elif kind is Kind.FILE_RENAME:
        to = attributes.get("to")
        if not isinstance(to, str) or not to.startswith("/"):
            return None
        told["to"] = _normal(to)
    return Action(kind, _normal(target), told)


def _normal(path: str) -> str:
    return posixpath.normpath("/" + path.lstrip("/"))


def _is_seen(record: Record) -> bool:
    """Whether a policy can be asked about a record of what was only seen."""
    kernel = record["layer"] == Layer.KERNEL.value
    return kernel and record["type"] == RecordType.OBSERVED.value and record["kind"] in SEEN


def moment(text: str) -> float:
    """A record's time in seconds since the epoch."""
    return datetime.datetime.fromisoformat(text).timestamp()


# -- what would change -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a policy makes of a question, without its words."""

    effect: Effect
    would: Effect | None
    rule: str

    @classmethod
    def of(cls, decision: Decision) -> Answer:
        return cls(decision.effect, decision.would, decision.rule)

    @property
    def lenience(self) -> tuple[int, int]:
        would = self.effect if self.would is None else self.would
        return _LENIENCE.index(self.effect), _LENIENCE.index(would)

    def __str__(self) -> str:
        would = f" (enforced: {self.would.value})" if self.would else ""
        return f"{self.effect.value}{would} by {self.rule}"

    def as_json(self) -> dict[str, Json]:
        return {
            "effect": self.effect.value,
            "would": self.would.value if self.would else None,
            "rule": self.rule,
        }


@dataclass
class Change:
    """An action that the new policy answers otherwise, with all its repetitions."""

    kind: str
    target: str
    agent: str
    user: str
    old: Answer
    new: Answer
    count: int = 0
    runs: set[str] = field(default_factory=set)

    @property
    def opens(self) -> bool:
        return self.new.lenience > self.old.lenience

    def as_json(self) -> dict[str, Json]:
        return {
            "change": "opens" if self.opens else "closes",
            "kind": self.kind,
            "target": self.target,
            "agent": self.agent,
            "user": self.user,
            "old": self.old.as_json(),
            "new": self.new.as_json(),
            "count": self.count,
            "runs": sorted(self.runs),
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """What becomes of a log under a new policy, in numbers of acts."""

    changes: tuple[Change, ...]
    """What opens first, each sort by how often it happened."""
    replayed: int
    changed: int
    by_another_rule: int
    """Answered the same, by another rule."""
    left_out: Mapping[str, int]

    def as_json(self) -> dict[str, Json]:
        return {
            "replayed": self.replayed,
            "changed": self.changed,
            "by_another_rule": self.by_another_rule,
            "changes": [c.as_json() for c in self.changes],
            "not_replayed": dict(self.left_out),
        }


def difference(old: Policy, new: Policy, records: Iterable[Record | None]) -> Difference:
    """Asks two policies everything that is in a log, and tells where they differ."""
    replay = Replay((old, new))
    changes: dict[tuple[Json, ...], Change] = {}
    replayed = changed = by_another_rule = 0
    for q in replay.questions(records):
        before = Answer.of(old.decide(q.run, q.action, now=q.now))
        after = Answer.of(new.decide(q.run, q.action, now=q.now))
        replayed += q.count
        if before.lenience == after.lenience:
            by_another_rule += q.count if before.rule != after.rule else 0
            continue
        changed += q.count
        what = (q.action.kind.value, q.action.target, q.run.agent, q.run.user)
        change = changes.setdefault((*what, before, after), Change(*what, before, after))
        change.count += q.count
        change.runs.add(q.run.id)
    ordered = sorted(changes.values(), key=lambda c: (not c.opens, -c.count, c.kind, c.target))
    left_out = dict(replay.left_out.most_common())
    return Difference(tuple(ordered), replayed, changed, by_another_rule, left_out)
