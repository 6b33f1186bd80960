"""The vocabulary as types: action, decision, obligation, run. No I/O, no clock, no policy.

Every value here crosses process boundaries as JSON, so each type knows how to
become a plain mapping (`as_json`) and how to be read back strictly (`from_json`,
which raises `MalformedValue` for anything it does not know).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

NUMBER_LIMIT = 1 << 63
"""Counts and times are below it."""

E = TypeVar("E", bound=enum.StrEnum)

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict of these."""


class MalformedValue(ValueError):
    """A mapping that was to be one of this module's types is not one."""


class Kind(enum.StrEnum):
    """What an agent can try. The target of each kind is given behind it."""

    TOOL_CALL = "tool.call"  # the tool's name
    HTTP_REQUEST = "http.request"  # host:port
    NET_CONNECT = "net.connect"  # host:port, or address:port where there is no name
    NET_ACCEPT = "net.accept"  # address of who connects:port that the run listens on
    DNS_QUERY = "dns.query"  # the name asked for
    EXEC = "exec"  # the program's path
    EXIT = "exit"  # the program's path; observed only
    FILE_OPEN = "file.open"  # a path
    FILE_UNLINK = "file.unlink"
    FILE_RENAME = "file.rename"
    MCP_CALL = "mcp.call"  # server/tool
    LLM_REQUEST = "llm.request"  # provider/model
    RUN = "run"  # a run's own beginning and end; the agent's name
    GUARD = "guard"  # the state of the guard itself: reloads, repairs, gaps


DECIDED = tuple(k for k in Kind if k not in (Kind.EXIT, Kind.RUN, Kind.GUARD))
"""What a policy answers; the other kinds are only recorded."""


_KINDS: Mapping[str, Kind] = {kind.value: kind for kind in Kind}


class Effect(enum.StrEnum):
    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"


class Mode(enum.StrEnum):
    ENFORCE = "enforce"
    OBSERVE = "observe"


class Layer(enum.StrEnum):
    SDK = "sdk"
    PROXY = "proxy"
    KERNEL = "kernel"
    GATEWAY = "gateway"


AGENT_LAYERS = (Layer.SDK, Layer.PROXY, Layer.KERNEL)
"""The layers an agent's file may name; `gateway` is the brain they ask."""


class Rung(enum.StrEnum):
    """What the kernel layer proved on this host, strongest first."""

    LSM = "lsm"
    FMOD_RET = "fmod_ret"
    CGROUP = "cgroup"
    OBSERVE = "observe"
    OFF = "off"


class RunState(enum.StrEnum):
    REGISTERED = "registered"  # has an id and a socket, no process yet
    STARTING = "starting"  # has a cgroup; the layers are confirming it
    RUNNING = "running"  # every layer confirmed; the program may run
    ENDED = "ended"


LIVE_STATES = (RunState.REGISTERED, RunState.STARTING, RunState.RUNNING)

COMPONENTS: Mapping[Layer, tuple[str, ...]] = {
    Layer.SDK: ("gateway",),
    Layer.PROXY: ("redirect", "proxy"),
    Layer.KERNEL: ("ebpf",),
}
"""The components that confirm a run before it starts, by layer."""


@dataclass(frozen=True, slots=True)
class Action:
    """What an agent tries: a kind, a target, and whatever else is known of it.

    What attributes a kind has, docs/policy.md says under "Actions".
    """

    kind: Kind
    target: str
    attributes: Mapping[str, Json] = field(default_factory=dict)

    def as_json(self) -> dict[str, Json]:
        return {"kind": self.kind.value, "target": self.target, "attributes": dict(self.attributes)}

    @classmethod
    def from_json(cls, value: Json) -> Action:
        m = _mapping(value, "action")
        kind, target, attributes = m.get("kind"), m.get("target"), m.get("attributes")
        if type(kind) is str and type(target) is str and type(attributes) is dict:
            known = _KINDS.get(kind)
            if known is not None:  # as nearly always
                return cls(known, target, attributes)
        return cls(
            kind=_enum(Kind, m, "kind"),
            target=_text(m, "target"),
            attributes=_mapping(m.get("attributes") or {}, "attributes"),
        )


@dataclass(frozen=True, slots=True)
class Obligation:
    """Something that must be done for an allow to hold: `inspect`, `redact`, `inject`."""

    name: str
    parameters: Mapping[str, Json] = field(default_factory=dict)

    def as_json(self) -> dict[str, Json]:
        return {"name": self.name, "parameters": dict(self.parameters)}

    @classmethod
    def from_json(cls, value: Json) -> Obligation:
        m = _mapping(value, "obligation")
        return cls(_text(m, "name"), _mapping(m.get("parameters") or {}, "parameters"))


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to an action.

    In mode `observe` the effect is always `allow` and `would` says what `enforce`
    would have answered. `rule` is `FILE-ID/RULE-ID`, or a name in angle brackets
    for what no rule of a person decided (`<default>`, `<guard-list>`, `<no-policy>`).
    `approval` is the id of what a person is asked, or was asked for this allow.
    """

    effect: Effect
    reason: str
    rule: str
    policy: str
    mode: Mode = Mode.ENFORCE
    would: Effect | None = None
    obligations: Sequence[Obligation] = ()
    approval: str = ""
    asked_by: Sequence[str] = ()
    """Of an `ask`: every rule that asks, not only the one that is named. For the gateway alone."""

    @property
    def permits(self) -> bool:
        """True only for a plain allow; an `ask` is not a permission."""
        return self.effect is Effect.ALLOW

    def as_json(self) -> dict[str, Json]:
        return {
            "effect": self.effect._value_,  # `value` is a call
            "reason": self.reason,
            "rule": self.rule,
            "policy": self.policy,
            "mode": self.mode._value_,
            "would": self.would._value_ if self.would else None,
            "obligations": [o.as_json() for o in self.obligations],
            "approval": self.approval,
        }

    @classmethod
    def from_json(cls, value: Json) -> Decision:
        m = _mapping(value, "decision")
        would, obligations = m.get("would"), m.get("obligations") or []
        if not isinstance(obligations, list):
            raise MalformedValue("obligations must be a list")
        return cls(
            effect=_enum(Effect, m, "effect"),
            reason=_text(m, "reason"),
            rule=_text(m, "rule"),
            policy=_text(m, "policy"),
            mode=_enum(Mode, m, "mode"),
            would=None if would is None else _enum(Effect, m, "would"),
            obligations=tuple(Obligation.from_json(o) for o in obligations),
            approval=_text(m, "approval", ""),
        )


def deny(reason: str, *, rule: str, policy: str = "") -> Decision:
    """The answer for everything that went wrong. `rule` names what refused, in brackets."""
    return Decision(Effect.DENY, reason, rule, policy)


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of an agent: the kernel knows it by its cgroup, people by its id."""

    id: str
    agent: str
    user: str
    uid: int
    home: str = ""
    layers: frozenset[Layer] = frozenset()
    tags: tuple[str, ...] = ()
    state: RunState = RunState.REGISTERED
    argv: tuple[str, ...] = ()
    directory: str = ""
    cgroup: str = ""  # path below the cgroup2 root, no leading slash
    cgroup_id: int = 0  # the kernel's id of that cgroup (its inode number); 0 before it exists
    caller_uid: int = -1  # who asked for the run
    started: float = 0.0  # seconds since the epoch
    ended: float = 0.0  # 0.0 while it lives
    exit_code: int | None = None
    signal: int | None = None
    paused_by: int = -1  # the uid of who froze it; -1 while it is not paused
    share: str = ""  # digest of the policy's share of its sandbox, as it was when the run started

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    def as_json(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "agent": self.agent,
            "user": self.user,
            "uid": self.uid,
            "home": self.home,
            "layers": sorted(layer.value for layer in self.layers),
            "tags": list(self.tags),
            "state": self.state.value,
            "argv": list(self.argv),
            "directory": self.directory,
            "cgroup": self.cgroup,
            "cgroup_id": self.cgroup_id,
            "caller_uid": self.caller_uid,
            "started": self.started,
            "ended": self.ended,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "paused_by": self.paused_by,
            "share": self.share,
        }

    @classmethod
    def from_json(cls, value: Json) -> Run:
        m = _mapping(value, "run")
        try:
            return cls(
                id=_text(m, "id"),
                agent=_text(m, "agent"),
                user=_text(m, "user"),
                uid=int(m["uid"]),
                home=_text(m, "home"),
                layers=frozenset(Layer(x) for x in m["layers"]),
                tags=tuple(str(x) for x in m["tags"]),
                state=_enum(RunState, m, "state"),
                argv=tuple(str(x) for x in m["argv"]),
                directory=_text(m, "directory"),
                cgroup=_text(m, "cgroup"),
                cgroup_id=int(m["cgroup_id"]),
                caller_uid=int(m["caller_uid"]),
                started=float(m["started"]),
                ended=float(m["ended"]),
                exit_code=None if m.get("exit_code") is None else int(m["exit_code"]),
                signal=None if m.get("signal") is None else int(m["signal"]),
                paused_by=int(m.get("paused_by", -1)),
                share=_text(m, "share", ""),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise MalformedValue(f"run: {e}") from e


class RecordType(enum.StrEnum):
    """What an audit record tells."""

    DECISION = "decision"  # the gateway decided
    REFUSAL = "refusal"  # kernel or firewall refused without asking
    OBSERVED = "observed"  # seen, nothing was decided
    LIFECYCLE = "lifecycle"  # a run, a policy or a component changed state
    GAP = "gap"  # records are missing: `count` says how many, `reason` why
    ALERT = "alert"  # a person should look


@dataclass(frozen=True, slots=True)
class Report:
    """What a component tells the gateway to put into the audit log.

    `time` is in nanoseconds since the epoch, `count` how many equal events this
    stands for. `run` is a run's id, or "" where it is not known.
    """

    type: RecordType
    layer: Layer
    kind: Kind
    target: str
    time: int
    run: str = ""
    effect: Effect | None = None
    rule: str = ""
    reason: str = ""
    count: int = 1
    attributes: Mapping[str, Json] = field(default_factory=dict)

    def as_json(self) -> dict[str, Json]:
        return {
            "type": self.type.value,
            "layer": self.layer.value,
            "kind": self.kind.value,
            "target": self.target,
            "time": self.time,
            "run": self.run,
            "effect": self.effect.value if self.effect else None,
            "rule": self.rule,
            "reason": self.reason,
            "count": self.count,
            "attributes": dict(self.attributes),
        }

    @classmethod
    def from_json(cls, value: Json) -> Report:
        m = _mapping(value, "report")
        count, time = m.get("count", 1), m.get("time")
        if type(count) is not int or not 0 < count < NUMBER_LIMIT:
            raise MalformedValue("report: count must be a whole number above 0")
        if type(time) is not int or not 0 <= time < NUMBER_LIMIT:
            raise MalformedValue("report: time must be in nanoseconds since the epoch")
        return cls(
            type=_enum(RecordType, m, "type"),
            layer=_enum(Layer, m, "layer"),
            kind=_enum(Kind, m, "kind"),
            target=_text(m, "target"),
            time=time,
            run=_text(m, "run", ""),
            effect=None if m.get("effect") is None else _enum(Effect, m, "effect"),
            rule=_text(m, "rule", ""),
            reason=_text(m, "reason", ""),
            count=count,
            attributes=_mapping(m.get("attributes") or {}, "attributes"),
        )


def _mapping(value: Json, name: str) -> Mapping[str, Json]:
    if not isinstance(value, dict):
        raise MalformedValue(f"{name} must be an object")
    return value


def _text(m: Mapping[str, Json], key: str, default: str | None = None) -> str:
    value = m.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise MalformedValue(f"{key} must be text")
    return value


def _enum(enumeration: type[E], m: Mapping[str, Json], key: str) -> E:
    try:
        return enumeration(m.get(key, ""))
    except ValueError:
        known = ", ".join(e.value for e in enumeration)
        raise MalformedValue(f"{key} must be one of {known}") from None
