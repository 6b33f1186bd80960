"""Joins the records of the probes to sessions, and sessions to what is told of them. No I/O, no clock.

The caller passes the time (seconds, monotonic). Everything is bounded, and what a
bound takes away is told as unmeasured.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from aa.ebpf.tls.http import Http1, Http2, Request, Unread
from aa.ebpf.tls.records import Data, Totals

MAX_SESSIONS = 4096
MAX_PENDING = 256
"""Requests of one session that wait to be told."""
TELL_SECONDS = 1.0
"""After its head a request is told; what is transferred later is told as a continuation."""
CONTINUE_SECONDS = 60.0
"""Between two continuations of a session that goes on."""

BEFORE_ATTACH = "before-attach"
UNREADABLE = "unreadable-memory"
TOO_MANY = "too-many-sessions"

LookUp = Callable[[bytes], Totals | None]
"""What the kernel's table holds for a key of a session."""


@dataclass(frozen=True, slots=True)
class Who:
    """Whose session it is; the same for all that is told of it."""

    run: int  # cgroup id
    pid: int
    uid: int
    comm: str
    library: int
    since: int  # CLOCK_BOOTTIME of its beginning, or of the first that was seen of it
    peer: str = ""  # where the library knew it


@dataclass(frozen=True, slots=True)
class Seen:
    """A request, and the plaintext that its session transferred since what was told before."""

    who: Who
    request: Request
    time: int  # CLOCK_BOOTTIME, of the head or of the continuation
    sent: int
    received: int
    continued: bool = False  # only bytes are new


@dataclass(frozen=True, slots=True)
class Unmeasured:
    who: Who
    reason: str


Outcome = Seen | Unmeasured


@dataclass(slots=True)
class _Pending:
    request: Request
    time: int
    due: float


@dataclass(slots=True)
class _Session:
    who: Who
    key: bytes
    born: int
    stream: Http1 | Http2
    sent: int = 0
    received: int = 0
    told_sent: int = 0
    told_received: int = 0
    pending: deque[_Pending] = field(default_factory=deque)
    last: Request | None = None
    """The request that was told last: later bytes continue it."""
    continue_at: float = 0.0
    time: int = 0


class Sessions:
    """All sessions of governed processes that are known; `take` what there is to tell."""

    def __init__(self, look_up: LookUp, *, limit: int = MAX_SESSIONS) -> None:
        self._look_up = look_up
        self._limit = limit
        self._sessions: OrderedDict[tuple[bytes, int], _Session] = OrderedDict()
        self._ready: list[Outcome] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def take(self) -> list[Outcome]:
        ready, self._ready = self._ready, []
        return ready

    def feed(self, record: Data, now: float) -> None:
        """One record of the ring."""
        session = self._sessions.get((record.key, record.born))
        if session is None:
            if record.ended:
                return
            session = self._begin(record)
        session.time = record.head.time
        if record.peer and not session.who.peer:
            session.who = replace(session.who, peer=record.peer)
        if record.ended:
            session.sent = max(session.sent, record.offset)
            session.received = max(session.received, record.received)
            self._end(session)
            return
        if record.length and not record.data:
            self._ready.append(Unmeasured(session.who, UNREADABLE))
        for found in session.stream.feed(record.offset, record.data, record.length):
            if isinstance(found, Unread):
                self._ready.append(Unmeasured(session.who, found.reason))
            else:
                self._add(session, found, record, now)
        session.sent = max(session.sent, record.offset + record.length)
        session.received = max(session.received, record.received)

    def gone(self, pid: int) -> None:
        """A process has ended, and its sessions with it."""
        for session in [s for s in self._sessions.values() if s.who.pid == pid]:
            self._refresh(session)
            self._end(session)

    def flush(self, now: float) -> None:
        """Tells what has waited its time."""
        for session in self._sessions.values():
            if session.pending and session.pending[0].due <= now:
                self._refresh(session)
                self._tell_pending(session)
                session.continue_at = now + CONTINUE_SECONDS
            elif session.last is not None and session.continue_at <= now:
                self._refresh(session)
                self._continue(session)
                session.continue_at = now + CONTINUE_SECONDS

    def close(self) -> None:
        """Tells all there is: nobody will look any more."""
        for session in list(self._sessions.values()):
            self._refresh(session)
            self._end(session)

    def _begin(self, record: Data) -> _Session:
        who = Who(
            run=record.head.cgroup,
            pid=record.head.pid,
            uid=record.head.uid,
            comm=record.head.comm,
            library=record.library,
            since=record.born,
            peer=record.peer,
        )
        stream = Http2() if record.http2 else Http1()
        session = _Session(who, record.key, record.born, stream)
        self._sessions[(record.key, record.born)] = session
        if not record.from_start:
            self._ready.append(Unmeasured(who, BEFORE_ATTACH))
        if len(self._sessions) > self._limit:
            oldest = next(iter(self._sessions.values()))
            self._ready.append(Unmeasured(oldest.who, TOO_MANY))
            self._end(oldest)
        return session

    def _add(self, session: _Session, request: Request, record: Data, now: float) -> None:
        if isinstance(session.stream, Http1):
            # The request before it is over: all until here is its.
            session.sent = max(session.sent, request.at)
            session.received = max(session.received, record.received)
            self._tell_pending(session)
            self._continue(session)
        elif len(session.pending) >= MAX_PENDING:
            self._tell_pending(session)
        session.pending.append(_Pending(request, record.head.time, now + TELL_SECONDS))

    def _refresh(self, session: _Session) -> None:
        totals = self._look_up(session.key)
        if totals is not None and totals.born == session.born:
            session.sent = max(session.sent, totals.sent)
            session.received = max(session.received, totals.received)

    def _end(self, session: _Session) -> None:
        del self._sessions[(session.key, session.born)]
        self._tell_pending(session)
        self._continue(session)

    def _tell_pending(self, session: _Session) -> None:
        """Of several streams in one session the first gets the bytes: nobody knows better."""
        while session.pending:
            waiting = session.pending.popleft()
            self._tell(session, waiting.request, waiting.time, continued=False)
            session.last = waiting.request

    def _continue(self, session: _Session) -> None:
        more = (session.sent, session.received) != (session.told_sent, session.told_received)
        if session.last is not None and more:
            self._tell(session, session.last, session.time, continued=True)

    def _tell(self, session: _Session, request: Request, time: int, *, continued: bool) -> None:
        self._ready.append(
            Seen(
                session.who,
                request,
                time,
                session.sent - session.told_sent,
                session.received - session.told_received,
                continued,
            )
        )
        session.told_sent, session.told_received = session.sent, session.received
