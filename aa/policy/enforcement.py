"""How each rule is enforced on a host: by which mechanism, and what that mechanism cannot do. Pure.

A rule that nothing can enforce is not dropped: what happens is recorded with what the policy says of
it, and that is said here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aa.model import Effect, Mode, Rung
from aa.policy.compile import CHANGE, Bits, PathRule, Shape, opens_folder, path_rules
from aa.policy.network import listed
from aa.policy.rules import PolicyFile, Rule, Section
from aa.policy.sandbox import ESSENTIAL

Json = Any


class Mechanism(enum.StrEnum):
    PROXY = "proxy"
    GATEWAY = "gateway"
    UNIT = "unit"
    LANDLOCK = "landlock"
    LSM = "lsm"
    DETECT = "detect only"
    NONE = "nothing"


@dataclass(frozen=True, slots=True)
class Host:
    """What this host has. None is what could not be found out."""

    rung: Rung | None = None
    landlock: int | None = None
    """The kernel's ABI, 0 for none."""
    inspection: bool | None = None
    """Whether the engine for looking into TLS is installed."""

    def as_json(self) -> dict[str, Json]:
        return {
            "rung": self.rung.value if self.rung else None,
            "landlock": self.landlock,
            "inspection": self.inspection,
        }


@dataclass(frozen=True, slots=True)
class Way:
    """One mechanism, and in words what it does for a rule."""

    mechanism: Mechanism
    words: str

    def as_json(self) -> dict[str, Json]:
        return {"mechanism": self.mechanism.value, "words": self.words}


@dataclass(frozen=True, slots=True)
class Enforced:
    """A rule, a default or a sandbox key, with all that enforces it, the strongest first."""

    file: str
    line: int
    key: str
    effect: str
    ways: tuple[Way, ...]

    @property
    def mechanisms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(way.mechanism.value for way in self.ways))

    def as_json(self) -> dict[str, Json]:
        return {
            "file": self.file,
            "line": self.line,
            "key": self.key,
            "effect": self.effect,
            "ways": [way.as_json() for way in self.ways],
        }


INTERPRETERS = tuple(
    f"{top}/python3{v}" for top in ("/usr/bin", "/bin") for v in ("", ".11", ".13")
)
"""Of Debian 12 and 13."""
MINIMUM_ABI = 2
"""Of Landlock; aa-launch starts no run below it."""


def report(files: Sequence[PolicyFile], host: Host) -> list[Enforced]:
    """Everything in a policy that has to be enforced somewhere, by file and line."""
    found: list[Enforced] = []
    for f in files:
        for rule in f.rules:
            ways = tuple(enforcement(rule, f, host))
            found.append(Enforced(f.path, rule.line, rule.ref, rule.effect.value, ways))
        found += _of_defaults(f, host)
        found += _of_sandbox(f, host)
    return sorted(found, key=lambda e: (e.file, e.line, e.key))


def enforcement(rule: Rule, file: PolicyFile, host: Host) -> Iterator[Way]:
    """What enforces a rule on a host."""
    if file.mode is Mode.OBSERVE:
        yield Way(Mechanism.DETECT, "the file only observes: what it says is recorded")
        return
    match rule.section:
        case Section.NETWORK:
            yield from _network(rule, host)
        case Section.DNS:
            yield Way(Mechanism.PROXY, "its DNS forwarder answers or refuses")
        case Section.INBOUND:
            yield _inbound(rule)
        case Section.FILE | Section.EXEC:
            yield from _paths(rule, file, host)
        case Section.TOOL:
            yield Way(Mechanism.GATEWAY, _ASKED)
        case Section.MCP:
            yield Way(Mechanism.GATEWAY, _ASKED)
        case Section.LLM:
            yield _inspected("requests to models", host)


_ASKED = (
    "answers what the agent's SDK or hook asks; a program that does not ask is not stopped by it"
)


# -- the network -------------------------------------------------------------------------------


def _network(rule: Rule, host: Host) -> Iterator[Way]:
    n = rule.network
    assert n is not None
    if n.content:
        yield _inspected("each request", host)
        if rule.effect is Effect.DENY:
            words = "connections that no other rule inspects: their requests are not seen"
            yield Way(Mechanism.NONE, words)
        return
    yield Way(Mechanism.PROXY, "decides each connection" + (", and inspects it" * n.inspects))
    if n.inspects and host.inspection is False:
        yield _inspected("its requests", host)


def _inspected(what: str, host: Host) -> Way:
    missing = "; agent-assembly-inspect is not installed here, so all of that is denied"
    more = missing if host.inspection is False else ""
    return Way(Mechanism.PROXY, f"its inspection decides {what}{more}")


def _inbound(rule: Rule) -> Way:
    if rule.effect is Effect.DENY:
        words = "nothing from outside reaches a run behind the proxy in this version, whatever rules say"
        return Way(Mechanism.PROXY, words)
    words = "not opened in this version: inbound connections to a run behind the proxy stay closed"
    return Way(Mechanism.NONE, words)


# -- files and programs ------------------------------------------------------------------------


def _paths(rule: Rule, file: PolicyFile, host: Host) -> Iterator[Way]:
    """Patterns that are enforced alike are told together."""
    timed = rule.when is not None
    alike: dict[tuple[Way, ...], list[str]] = {}
    for p in path_rules(rule):
        ways = _denied(p, timed, host) if rule.effect is Effect.DENY else _allowed(p, timed, file)
        alike.setdefault(tuple(ways), []).append(p.pattern)
    for found, patterns in alike.items():
        named = f"{listed(patterns)}: " if len(alike) > 1 else ""
        for way in found:
            yield Way(way.mechanism, named + way.words)


_PATTERN = "for a * inside a path; only programs in the kernel could match it"
_TIMED = "for a rule that holds at some times: a run's mounts are made once"
_LATER = "what is missing when a run starts, and another name of the same file, are not covered"


def _denied(p: PathRule, timed: bool, host: Host) -> Iterator[Way]:
    if timed or p.shape is Shape.OTHER:
        yield _detected(_TIMED if timed else _PATTERN, host)
        return
    if p.shape is Shape.TREE and not p.bits & ~Bits.DELETE:
        yield _detected("for removing what is in a folder that can be written to", host)
        return
    if p.bits & Bits.READ and any(_within(path, p.prefix) for path in ESSENTIAL):
        yield Way(Mechanism.UNIT, "no run starts: every program needs to read there")
        return
    if p.bits & Bits.EXEC and any(_within(path, p.prefix) for path in INTERPRETERS):
        if p.prefix in INTERPRETERS:
            yield _detected("for python3, which aa-launch's shim is started by", host)
        else:
            yield Way(Mechanism.UNIT, "no run starts: aa-launch's shim is executed there")
        return
    yield Way(Mechanism.UNIT, f"{_mounted(p)}; {_LATER}")
    if p.bits & Bits.EXEC:
        yield Way(Mechanism.NONE, "a script can still be read by its interpreter")


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _mounted(p: PathRule) -> str:
    which = "the names that fit, as they are when a run starts, are" if p.rest else "it is"
    if p.shape is Shape.TREE:
        which = "the folder is"
    if p.bits & Bits.EXEC:
        return f"{which} mounted without execution"
    if p.bits & Bits.READ:
        less = "" if p.bits & CHANGE == CHANGE else ", so it cannot be changed either"
        return f"{which} hidden{less}"
    if p.bits & Bits.WRITE:
        less = "" if p.bits & Bits.DELETE else ", so it cannot be removed either"
        return f"{which} mounted read-only{less}"
    return f"{which} bound to its place, and can be neither moved nor removed"


def _detected(why: str, host: Host) -> Way:
    proved = f"; this host proved rung {host.rung.value}" if host.rung else ""
    return Way(Mechanism.DETECT, f"{why} (lsm), which this version does not have{proved}")


def _allowed(p: PathRule, timed: bool, file: PolicyFile) -> Iterator[Way]:
    section = Section.EXEC if p.bits & Bits.EXEC else Section.FILE
    denies = file.default(section) == Effect.DENY.value
    if timed or p.shape in (Shape.NAMES, Shape.OTHER):
        why = (
            "a grant is for a whole run" if timed else "a grant is of a path, or of a folder by /**"
        )
        yield Way(Mechanism.NONE, f"opens nothing: {why}")
        return
    if opens_folder(p):
        yield Way(Mechanism.UNIT, "the folder is writable")
        yield Way(Mechanism.LANDLOCK, "grants it")
    elif p.bits & CHANGE:
        fix = "a folder becomes writable by /** with write and delete, or by [sandbox] writable"
        yield Way(Mechanism.NONE, f"opens nothing for writing: {fix}")
    if p.bits & (Bits.READ | Bits.EXEC):
        if denies:
            yield Way(Mechanism.LANDLOCK, "grants it, if it is there when a run starts")
        else:
            words = f"changes nothing while default.{section.value} is {file.default(section)}"
            yield Way(Mechanism.NONE, words)


# -- defaults and [sandbox] --------------------------------------------------------------------


def _of_defaults(f: PolicyFile, host: Host) -> Iterator[Enforced]:
    for section in (Section.EXEC, Section.FILE):
        value = f.defaults.get(section)
        if value is None or f.mode is Mode.OBSERVE or (section, value) == (Section.EXEC, "allow"):
            continue
        ways = tuple(_default(section, value, host))
        key = f"policy.default.{section.value}"
        yield Enforced(f.path, f.line(section), key, value, ways)


def _default(section: Section, value: str, host: Host) -> Iterator[Way]:
    if section is Section.EXEC:
        if value == "deny":
            yield Way(Mechanism.UNIT, "every mount is without execution but for what rules allow")
            yield _landlock("grants execution of what rules allow alone", host)
            words = "python3, which aa-launch's shim needs, can be started by way of the loader"
            yield Way(Mechanism.NONE, words)
        return
    match value:
        case "deny":
            yield _landlock(
                "grants reading of the system's folders and what rules allow alone", host
            )
            yield Way(Mechanism.NONE, "that a file is there, its size and owner can be seen")
        case "sandbox":
            yield Way(Mechanism.UNIT, "all but the writable folders is mounted read-only")
            yield _landlock("grants writing in them alone", host)
        case "allow":
            yield Way(Mechanism.UNIT, "the system's folders stay read-only; else as the user may")


def _of_sandbox(f: PolicyFile, host: Host) -> Iterator[Enforced]:
    box = f.sandbox

    def of(key: str, value: object, *ways: Way) -> Enforced:
        line = f.document.line(("sandbox", key))
        return Enforced(f.path, line, f"sandbox.{key}", str(value), ways)

    if box.writable is not None:
        words = "grants writing in them"
        mounted = Way(Mechanism.UNIT, "the folders are mounted writable")
        yield of("writable", len(box.writable), mounted, _landlock(words, host))
    if box.read_only:
        words = f"mounted read-only in a writable folder; {_LATER}"
        yield of("read_only", len(box.read_only), Way(Mechanism.UNIT, words))
    if box.user_namespaces is not None:
        if box.user_namespaces:
            words = "no run starts: it needs programs in the kernel (lsm), which this version does not have"
            yield of("user_namespaces", "allow", Way(Mechanism.NONE, words))
        else:
            ways = Way(Mechanism.UNIT, "none can be made"), _landlock("no mount can", host)
            yield of("user_namespaces", "deny", *ways)
    for key, value in (("memory", box.memory), ("tasks", box.tasks)):
        if value is not None:
            yield of(key, value, Way(Mechanism.UNIT, "a limit of the run's cgroup"))


def _landlock(words: str, host: Host) -> Way:
    if host.landlock is not None and host.landlock < MINIMUM_ABI:
        missing = f"this kernel has ABI {host.landlock}, below {MINIMUM_ABI}: no run starts"
        return Way(Mechanism.NONE, missing)
    return Way(Mechanism.LANDLOCK, words)
