"""Approvals: what a person is asked about, and what they said. They survive restarts and kill -9.

An approval is bound to one exact action of one run and to the rules that asked. It is given by
somebody whom those rules name, before it expires, and used once, or for the rest of the run where
they say so. A denial holds for the same action as long as the question would have. A change that
cannot be written to disk is not made: then what would be asked is denied.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aa.gateway.runs import ID_ALPHABET, ID_LENGTH
from aa.model import Action, Decision, Effect, Kind, Layer, Run
from aa.policy import Policy
from aa.policy.approve import Approve

ACTION_LIMIT = 64 << 10
"""Characters of an action as JSON: what nobody can look through is not asked about."""
NOTE_LIMIT = 500
"""Characters of what a person says with their answer."""
CLOSED_KEPT = 1000
"""Approvals that are over and still listed; older ones are in the audit log only."""
LISTED = 200
SUMMARY_LIMIT = 512
"""Characters of each text, and of the attributes, in a list."""
USED_KEPT = 256
"""Used approvals of a run that a later step of the same action may still name."""
GRANT_SECONDS = 60.0
"""How long an approval can be used at least, however late it was given."""

CONTEXT = frozenset(("uid", "original", "via", "ech", "http"))
"""Attributes that tell a person more and that no rule depends on."""
REDUCIBLE = ("addresses", "protocol", "headers", "body", "ws")
"""Attributes of network actions that an approval is bound to only if a rule asks because of them:
the steps of one connection or request differ in them."""
NETWORK_KINDS = (Kind.NET_CONNECT, Kind.HTTP_REQUEST)

SCHEMA = """
create table if not exists approval (
    id text primary key,
    state text not null,
    created real not null,
    json text not null
) strict;
create index if not exists approval_by_state on approval (state, created);
"""

Json = Any
Decide = Callable[[Action], Decision]
Watcher = Callable[["Approval"], None]

log = logging.getLogger(__name__)


class State(enum.StrEnum):
    PENDING = "pending"
    APPROVED = "approved"  # and not used yet, or remembered for its run
    DENIED = "denied"
    EXPIRED = "expired"  # nobody said anything in time
    USED = "used"
    WITHDRAWN = "withdrawn"  # its run ended, or its question could not be recorded


OPEN = (State.PENDING, State.APPROVED, State.DENIED, State.USED)
"""States that still mean something for the action."""


class ApprovalsUnavailable(Exception):
    """Approvals cannot be kept, so nobody can be asked."""


class ApprovalUnknown(Exception):
    """No such approval, or not of this run."""


class NotPending(Exception):
    """It was decided already, or is over."""


class NotAllowed(Exception):
    """The rules name others for this."""


class TooManyPending(Exception):
    """A limit of pending approvals is reached."""

    def __init__(self, reason: str, limit: str) -> None:
        self.limit = limit
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who answers: the user behind the uid of a connection, as the kernel tells it."""

    uid: int
    name: str
    groups: frozenset[str] = frozenset()

    def is_named(self, whom: Sequence[str]) -> bool:
        """Whether a list of `user:NAME` and `group:NAME` has this operator in it."""
        return f"user:{self.name}" in whom or any(f"group:{g}" in whom for g in self.groups)


@dataclass(frozen=True, slots=True)
class Terms:
    """Who may answer, within how many seconds, and for how long it counts.

    `by` has one list for each rule that asks: whoever answers is in all of them.
    """

    by: tuple[tuple[str, ...], ...]
    timeout: float
    remember: bool

    @classmethod
    def of(cls, said: Approve) -> Terms:
        return cls((said.by,), said.timeout, said.remember == "run")

    @classmethod
    def together(cls, several: Sequence[Terms]) -> Terms:
        """The strictest of each; `several` is not empty."""
        by = dict.fromkeys(whom for terms in several for whom in terms.by)
        return cls(tuple(by), min(t.timeout for t in several), all(t.remember for t in several))


UNSAID = Terms.of(Approve())
"""The terms of rules, and of defaults, that do not say."""


@dataclass(frozen=True, slots=True)
class Question:
    """What an approval is bound to, besides its run."""

    attributes: Mapping[str, Json]
    rules: tuple[str, ...]
    digest: str


def question(run: str, action: Action, decision: Decision, decide: Decide) -> Question:
    """What a decision asks. `decide` is the policy that made it.

    An approval of a name is one for its addresses too, unless a rule asks because of an address:
    each reducible attribute is left out if the same rules ask without it.
    """
    attributes = {k: v for k, v in action.attributes.items() if k not in CONTEXT}
    rules = tuple(decision.asked_by) or (decision.rule,)
    if action.kind in NETWORK_KINDS:
        for name in REDUCIBLE:
            if name not in attributes:
                continue
            less = {k: v for k, v in attributes.items() if k != name}
            without = decide(replace(action, attributes=less))
            asking = tuple(without.asked_by) or (without.rule,)
            if without.effect is Effect.ASK and set(rules) <= set(asking):
                attributes, rules = less, asking
    rules = tuple(sorted(rules))
    whole = {"run": run, "kind": action.kind.value, "target": action.target, "is": attributes}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return Question(attributes, rules, hashlib.sha256(text.encode("ascii")).hexdigest())


@dataclass(frozen=True, slots=True)
class Approval:
    """One question to a person, and its answer."""

    id: str
    run: str
    agent: str
    user: str
    layer: Layer
    action: Action
    bound: Mapping[str, Json]
    """The attributes that it is bound to; the action's others are context."""
    digest: str
    rules: tuple[str, ...]
    reason: str
    policy: str
    by: tuple[tuple[str, ...], ...]
    remember: bool
    created: float
    expires: float
    state: State = State.PENDING
    decided: float = 0.0
    decided_uid: int = -1
    decided_by: str = ""
    note: str = ""

    def covers(self, asked: Question) -> bool:
        return self.digest == asked.digest and set(asked.rules) <= set(self.rules)

    def may_be_answered_by(self, operator: Operator) -> bool:
        """Root may always: it could change the policy as well."""
        return operator.uid == 0 or all(operator.is_named(whom) for whom in self.by)

    @property
    def whom(self) -> str:
        """Who is asked, in words."""
        return ", and ".join(" or ".join(whom) for whom in self.by)

    def as_json(self) -> dict[str, Json]:
        """Flat, as operators get it; `from_json` reads it back."""
        told = asdict(self)
        del told["action"]
        return {
            **told,
            "layer": self.layer.value,
            "state": self.state.value,
            "kind": self.action.kind.value,
            "target": self.action.target,
            "attributes": dict(self.action.attributes),
            "rules": list(self.rules),
            "by": [list(whom) for whom in self.by],
        }

    def summary(self) -> dict[str, Json]:
        """The same, short enough for a list of many."""
        told = self.as_json()
        for name in ("target", "reason", "note"):
            told[name] = _cut(told[name])
        for name in ("attributes", "bound"):
            size = len(json.dumps(told[name]))
            if size > SUMMARY_LIMIT:
                told[name] = {"omitted": f"{size} characters"}
        return told

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Approval:
        """Raises KeyError, TypeError or ValueError for what is not one."""
        m = dict(value)
        action = Action(Kind(m.pop("kind")), str(m.pop("target")), dict(m.pop("attributes")))
        m["by"] = tuple(tuple(str(w) for w in whom) for whom in m["by"])
        m["rules"] = tuple(str(r) for r in m["rules"])
        m["layer"], m["state"] = Layer(m["layer"]), State(m["state"])
        return cls(action=action, **m)


class Approvals:
    """The approvals of all runs. `problem` says why nobody can be asked."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._open: dict[str, Approval] = {}
        self._standing: dict[tuple[str, str], str] = {}
        """The id that is pending, approved or denied for a run's digest."""
        self._changed: dict[str, asyncio.Event] = {}
        self._watchers: set[Watcher] = set()
        self._terms: tuple[Policy | None, dict[str, Terms]] = (None, {})
        self.problem = ""
        try:
            self._connect()
        except (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError) as e:
            self._fail(f"{e}; move it away to begin with none, then restart aa-gateway")

    def _connect(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        db.execute("pragma journal_mode = wal")
        # In the page cache after each change, which kill -9 does not touch.
        db.execute("pragma synchronous = normal")
        if db.execute("pragma quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("its check failed")
        db.executescript(SCHEMA)
        marks = ", ".join("?" * len(OPEN))
        rows = db.execute(
            f"select json from approval where state in ({marks}) order by created",
            [s.value for s in OPEN],
        )
        for (text,) in rows:
            self._keep(Approval.from_json(json.loads(text)))
        self._db = db

    # -- what an action meets

    def find(self, run: str, asked: Question, continues: str = "") -> Approval | None:
        """What stands for an action: pending, approved or denied. With `continues`, also the used
        approval of an earlier step of the same action."""
        earlier = self._open.get(continues) if continues else None
        if earlier is not None and earlier.run == run and earlier.covers(asked):
            if earlier.state in (State.APPROVED, State.USED):
                return earlier
        found = self._open.get(self._standing.get((run, asked.digest), ""))
        if found is None or not found.covers(asked):
            return None
        return found if self._due(found) is None else None

    def ask(
        self,
        run: Run,
        layer: Layer,
        action: Action,
        asked: Question,
        decision: Decision,
        terms: Terms,
        *,
        per_run: int,
        in_all: int,
    ) -> Approval:
        """A new question. Raises `TooManyPending` or `ApprovalsUnavailable`."""
        if len(json.dumps(action.as_json())) > ACTION_LIMIT:
            raise TooManyPending(
                f"it is larger than {ACTION_LIMIT} characters, which nobody can look through",
                "approval_action_size",
            )
        pending = self.pending()
        if sum(1 for a in pending if a.run == run.id) >= per_run:
            raise TooManyPending(
                f"{per_run} questions of this run wait for a person already "
                "(gateway.max_pending_approvals_per_run in agent-assembly.toml)",
                "max_pending_approvals_per_run",
            )
        if len(pending) >= in_all:
            raise TooManyPending(
                f"{in_all} questions wait for a person already "
                "(gateway.max_pending_approvals in agent-assembly.toml)",
                "max_pending_approvals",
            )
        now = self._clock()
        approval = Approval(
            id=self._new_id(),
            run=run.id,
            agent=run.agent,
            user=run.user,
            layer=layer,
            action=action,
            bound=asked.attributes,
            digest=asked.digest,
            rules=asked.rules,
            reason=decision.reason,
            policy=decision.policy,
            by=terms.by,
            remember=terms.remember and "/" not in run.id,  # a user outside a run has no end
            created=now,
            expires=now + terms.timeout,
        )
        return self._put(approval)

    def use(self, approval: Approval) -> Approval:
        """An action goes on with it. Raises `ApprovalsUnavailable`."""
        if approval.state is State.APPROVED and not approval.remember:
            return self._put(replace(approval, state=State.USED))
        return approval

    def terms(self, policy: Policy, rules: Sequence[str]) -> Terms:
        if self._terms[0] is not policy:
            said = {rule.ref: Terms.of(rule.approve) for rule in policy.rules if rule.approve}
            self._terms = (policy, said)
        return Terms.together([self._terms[1].get(ref, UNSAID) for ref in rules])

    # -- what a person says

    def answerable(self, approval_id: str, operator: Operator) -> Approval:
        """A pending approval that this operator may answer. Raises `ApprovalUnknown`,
        `NotPending` or `NotAllowed`."""
        approval = self.get(approval_id)
        if approval is None:
            raise ApprovalUnknown(f"no approval {approval_id}")
        approval = self._due(approval) or approval
        if approval.state is not State.PENDING:
            by = f" by {approval.decided_by}" if approval.decided_by else ""
            raise NotPending(f"approval {approval_id} is {approval.state}{by} already")
        if not approval.may_be_answered_by(operator):
            raise NotAllowed(f"approval {approval_id} is for {approval.whom}, not {operator.name}")
        return approval

    def answer(self, approval: Approval, operator: Operator, *, yes: bool, note: str) -> Approval:
        """Raises `ApprovalsUnavailable`."""
        now = self._clock()
        return self._put(
            replace(
                approval,
                state=State.APPROVED if yes else State.DENIED,
                decided=now,
                decided_uid=operator.uid,
                decided_by=operator.name,
                note=note[:NOTE_LIMIT],
                expires=max(approval.expires, now + GRANT_SECONDS) if yes else approval.expires,
            )
        )

    # -- time, and ends of runs

    def expire(self) -> None:
        """Ends what is over; watchers hear of it."""
        for approval in list(self._open.values()):
            self._due(approval)

    def _due(self, approval: Approval) -> Approval | None:
        """The same approval as expired, if its time is over."""
        lasts = approval.remember and approval.state is State.APPROVED
        if approval.state is State.USED or lasts or self._clock() < approval.expires:
            return None
        return self._close(approval, State.EXPIRED)

    def withdraw(self, approval: Approval) -> None:
        self._close(approval, State.WITHDRAWN)

    def withdraw_all_but(self, lives: Callable[[str], bool]) -> None:
        """Ends the approvals of runs that are over."""
        for approval in list(self._open.values()):
            if not lives(approval.run):
                self._close(approval, State.WITHDRAWN)

    def _close(self, approval: Approval, state: State) -> Approval:
        """The end of an approval holds even when the disk does not take it: its time is on disk."""
        self._forget(approval)
        if approval.state in (State.DENIED, State.USED):
            return approval
        closed = replace(approval, state=state)
        with contextlib.suppress(ApprovalsUnavailable):
            self._write(closed)
        self._tell(closed)
        return closed

    # -- looking

    def pending(self) -> list[Approval]:
        return [a for a in self._open.values() if a.state is State.PENDING]

    def listed(self, *, closed: bool = False) -> list[Approval]:
        """Those that are pending or approved, or all that are kept; the newest `LISTED`, first."""
        if not closed or self._db is None:
            found = [a for a in self._open.values() if a.state in (State.PENDING, State.APPROVED)]
            return sorted(found, key=lambda a: -a.created)[:LISTED]
        rows = self._db.execute(
            "select json from approval order by created desc limit ?", (LISTED,)
        )
        return [Approval.from_json(json.loads(text)) for (text,) in rows]

    def get(self, approval_id: str) -> Approval | None:
        found = self._open.get(approval_id)
        if found is None and self._db is not None:
            row = self._db.execute(
                "select json from approval where id = ?", (approval_id,)
            ).fetchone()
            found = Approval.from_json(json.loads(row[0])) if row else None
        return found

    async def wait(self, approval_id: str, run: str, seconds: float) -> Approval:
        """The approval once it is not pending any more, or as it is after `seconds`. Raises
        `ApprovalUnknown` for one that is not this run's."""
        found = self.get(approval_id)
        if found is None or found.run != run:
            raise ApprovalUnknown(f"run {run} has no approval {approval_id}")
        if found.state is State.PENDING:
            changed = self._changed.setdefault(approval_id, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(seconds, max(0, found.expires - self._clock()))):
                    await changed.wait()
            found = self.get(approval_id) or found
        return self._due(found) or found if found.id in self._open else found

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher` with each approval that changes; returns the function that ends it."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    # -- keeping

    def _new_id(self) -> str:
        while True:
            made = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
            if self.get(made) is None:
                return made

    def _put(self, approval: Approval) -> Approval:
        self._write(approval)
        self._forget(approval)
        self._keep(approval)
        self._tell(approval)
        return approval

    def _write(self, approval: Approval) -> None:
        if self._db is None:
            raise ApprovalsUnavailable(self.problem)
        try:
            self._db.execute(
                "insert or replace into approval values (?, ?, ?, ?)",
                (approval.id, approval.state.value, approval.created, _dumped(approval)),
            )
            if approval.state not in (State.PENDING, State.APPROVED):
                self._tidy()
        except sqlite3.Error as e:
            self._fail(str(e))
            raise ApprovalsUnavailable(self.problem) from e
        self.problem = ""

    def _tidy(self) -> None:
        assert self._db is not None
        self._db.execute(
            "delete from approval where state not in ('pending', 'approved') and id not in "
            "(select id from approval where state not in ('pending', 'approved') "
            "order by created desc limit ?)",
            (CLOSED_KEPT,),
        )

    def _keep(self, approval: Approval) -> None:
        if approval.state not in OPEN:
            return
        self._open[approval.id] = approval
        if approval.state is State.USED:
            used = [
                a for a in self._open.values() if a.run == approval.run and a.state is State.USED
            ]
            for old in used[:-USED_KEPT]:
                self._forget(old)
        else:
            self._standing[approval.run, approval.digest] = approval.id

    def _forget(self, approval: Approval) -> None:
        self._open.pop(approval.id, None)
        key = (approval.run, approval.digest)
        if self._standing.get(key) == approval.id:
            del self._standing[key]

    def _tell(self, approval: Approval) -> None:
        if approval.state is not State.PENDING:
            changed = self._changed.pop(approval.id, None)
            if changed is not None:
                changed.set()
        for watcher in list(self._watchers):
            watcher(approval)

    def _fail(self, why: str) -> None:
        problem = f"approvals cannot be kept, so what needs one is denied: {self._path}: {why}"
        if problem != self.problem:
            log.error("%s", problem)
        self.problem = problem

    def close(self) -> None:
        if self._db is not None:
            self._db.close()


def _cut(text: str) -> str:
    return text if len(text) <= SUMMARY_LIMIT else text[: SUMMARY_LIMIT - 1] + "…"


def _dumped(approval: Approval) -> str:
    return json.dumps(approval.as_json(), separators=(",", ":"))
