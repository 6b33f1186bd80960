"""What of a policy other mechanisms than the engine enforce, as data: for the kernel, for Landlock, for a unit.

Pure: a policy and a run go in. Which files there are, and what they are, is for the launch to see.
Nothing is widened: what cannot be expressed is left out where it would open something, and told by
`aa.policy.enforcement` where it would close something.
"""

from __future__ import annotations

import enum
import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aa.config import folder_problem
from aa.model import Effect, MalformedValue
from aa.policy.address import Range
from aa.policy.matchers import Access
from aa.policy.pathname import PathPattern
from aa.policy.rules import Rule
from aa.policy.sandbox import Sandbox

Json = Any

DIGEST_LENGTH = 16
"""Hex digits of a share's digest; it is kept with every run."""


class Bits(enum.IntFlag):
    """What is done to a path."""

    READ = 1
    WRITE = 2
    DELETE = 4
    EXEC = 8


_BITS = {Access.READ: Bits.READ, Access.WRITE: Bits.WRITE, Access.DELETE: Bits.DELETE}
CHANGE = Bits.WRITE | Bits.DELETE


class Shape(enum.Enum):
    """How much of a pattern a mount can say."""

    PATH = "path"  # one path, and what lies below it if it is a folder
    TREE = "tree"  # a folder and all below it
    NAMES = "names"  # names of one folder that fit a glob: those that are there when a run starts
    OTHER = "other"  # nothing of it


@dataclass(frozen=True, slots=True)
class PathRule:
    """A file or exec rule as a walk up the tree can match it: a fixed folder, and the rest of the way."""

    effect: Effect
    prefix: str  # absolute, `~`, or below it
    rest: str  # the pattern below the prefix; "" for the prefix itself
    whole: bool  # `**` as the rest means the prefix as well
    bits: Bits
    rule: str

    @property
    def pattern(self) -> str:
        """As a rule has it."""
        return "/".join((self.prefix.rstrip("/"), self.rest)) if self.rest else self.prefix

    @property
    def shape(self) -> Shape:
        if not self.rest:
            return Shape.PATH
        if self.rest == "**":
            return Shape.TREE
        return Shape.NAMES if "/" not in self.rest and "**" not in self.rest else Shape.OTHER

    def as_json(self) -> dict[str, Json]:
        return {
            "effect": self.effect.value,
            "prefix": self.prefix,
            "rest": self.rest,
            "whole": self.whole,
            "bits": int(self.bits),
            "rule": self.rule,
        }


@dataclass(frozen=True, slots=True)
class AddressEntry:
    """A range of addresses at some ports (None: all). `protocol` is as rules have it."""

    range: Range
    ports: tuple[int, ...] | None
    protocol: str
    rule: str

    def as_json(self) -> dict[str, Json]:
        return {
            "cidr": self.range.text,
            "ports": None if self.ports is None else list(self.ports),
            "protocol": self.protocol,
            "rule": self.rule,
        }


@dataclass(frozen=True, slots=True)
class Addresses:
    """What is known of addresses without a name: for a guard that sees packets. Deny goes first.

    A guard that allowed by `allow` alone would be too strict for connections by name, never too lax.
    """

    allow: tuple[AddressEntry, ...]
    deny: tuple[AddressEntry, ...]
    default: str


@dataclass(frozen=True, slots=True)
class Closed:
    """What the unit of a run must not reach, by a deny rule. `names` is a glob of names in `path`, or ""."""

    path: str  # absolute, `~`, or below it
    names: str
    bits: Bits
    rule: str

    def as_json(self) -> dict[str, Json]:
        return {"path": self.path, "names": self.names, "bits": int(self.bits), "rule": self.rule}


@dataclass(frozen=True, slots=True)
class Share:
    """The sandbox's share of a policy. Paths that begin with neither `/` nor `~` are below the working
    directory."""

    writable: tuple[str, ...] | None = None
    """None: the working directory alone."""
    file: str = "sandbox"
    exec: str = "allow"
    closed: tuple[Closed, ...] = ()
    read_only: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    """What `file = "deny"` leaves open, besides what every program needs."""
    executable: tuple[str, ...] = ()
    """The same of `exec = "deny"`."""
    user_namespaces: bool = False
    memory: int | None = None  # bytes
    tasks: int | None = None

    @property
    def digest(self) -> str:
        """Equal for shares that make the same sandbox."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]

    def as_json(self) -> dict[str, Json]:
        return {
            "writable": None if self.writable is None else list(self.writable),
            "file": self.file,
            "exec": self.exec,
            "closed": [c.as_json() for c in self.closed],
            "read_only": list(self.read_only),
            "readable": list(self.readable),
            "executable": list(self.executable),
            "user_namespaces": self.user_namespaces,
            "memory": self.memory,
            "tasks": self.tasks,
        }

    @classmethod
    def from_json(cls, value: Json) -> Share:
        """Reads it back, strictly. Raises MalformedValue."""
        known = cls().as_json().keys()
        if not isinstance(value, dict) or value.keys() != known:
            raise MalformedValue("a share of the sandbox has other keys")
        try:
            return cls(
                writable=None if value["writable"] is None else _texts(value["writable"]),
                file=_one_of(value["file"], ("deny", "sandbox", "allow")),
                exec=_one_of(value["exec"], ("deny", "allow")),
                closed=tuple(_closed(c) for c in value["closed"]),
                read_only=_texts(value["read_only"]),
                readable=_texts(value["readable"]),
                executable=_texts(value["executable"]),
                user_namespaces=_one_of(value["user_namespaces"], (True, False)),
                memory=_number(value["memory"]),
                tasks=_number(value["tasks"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise MalformedValue(f"a share of the sandbox: {e}") from e


@dataclass(frozen=True, slots=True)
class Compiled:
    """Everything of a policy that is not asked for at the engine, for one kind of run."""

    addresses: Addresses
    paths: tuple[PathRule, ...]
    share: Share

    def as_json(self) -> dict[str, Json]:
        return {
            "addresses": {
                "allow": [e.as_json() for e in self.addresses.allow],
                "deny": [e.as_json() for e in self.addresses.deny],
                "default": self.addresses.default,
            },
            "paths": [p.as_json() for p in self.paths],
            "share": self.share.as_json(),
            "digest": self.share.digest,
        }


def compiled(
    rules: Sequence[Rule], sandbox: Sandbox, *, file: str, exec_: str, network: str
) -> Compiled:
    """Of the rules that bind a run, in their order, the merged [sandbox] and the strictest defaults."""
    paths = tuple(p for rule in rules for p in path_rules(rule))
    return Compiled(_addresses(rules, network), paths, _share(rules, paths, sandbox, file, exec_))


# -- addresses ---------------------------------------------------------------------------------


def _addresses(rules: Sequence[Rule], default: str) -> Addresses:
    found: dict[Effect, list[AddressEntry]] = {effect: [] for effect in Effect}
    for rule in rules:
        n = rule.network
        if n is None or n.hosts or n.content or rule.when is not None:
            continue  # names, requests and times are not in a packet
        ports = None if n.ports is None else tuple(sorted(n.ports))
        found[rule.effect] += [AddressEntry(r, ports, n.protocol, rule.ref) for r in n.ranges]
    return Addresses(tuple(found[Effect.ALLOW]), tuple(found[Effect.DENY]), default)


# -- paths -------------------------------------------------------------------------------------


def path_rules(rule: Rule) -> Iterator[PathRule]:
    """A file or exec rule, one for each of its patterns."""
    if rule.file is not None:
        bits = Bits(0)
        for access in rule.file.access:
            bits |= _BITS[access]
        patterns: Iterable[PathPattern] = rule.file.paths
    elif rule.exec is not None:
        bits, patterns = Bits.EXEC, rule.exec.paths
    else:
        return
    for pattern in patterns:
        yield _path_rule(pattern, rule.effect, bits, rule.ref)


def _path_rule(pattern: PathPattern, effect: Effect, bits: Bits, rule: str) -> PathRule:
    rest = pattern.text.split("/")[len(pattern.literal) + 1 :]
    prefix = "/".join(("~" if pattern.home else "", *pattern.literal)) or "/"
    return PathRule(effect, prefix, "/".join(rest), pattern.whole, bits, rule)


# -- the sandbox -------------------------------------------------------------------------------


def _share(
    rules: Sequence[Rule], paths: Sequence[PathRule], sandbox: Sandbox, file: str, exec_: str
) -> Share:
    timed = {rule.ref for rule in rules if rule.when is not None}
    plain = [p for p in paths if p.rule not in timed]
    closed = sorted(
        (
            Closed(p.prefix, p.rest if p.shape is Shape.NAMES else "", p.bits, p.rule)
            for p in plain
            if p.effect is Effect.DENY and p.shape is not Shape.OTHER
        ),
        key=lambda c: (c.path, c.names, c.bits, c.rule),
    )
    allowed = [p for p in plain if p.effect is Effect.ALLOW and grantable(p)]
    return Share(
        writable=_writable(sandbox, allowed),
        file=file,
        exec=exec_,
        closed=tuple(closed),
        read_only=tuple(sorted(set(sandbox.read_only))),
        readable=_granted(allowed, Bits.READ) if file == "deny" else (),
        executable=_granted(allowed, Bits.EXEC) if exec_ == "deny" else (),
        user_namespaces=sandbox.user_namespaces is True,
        memory=sandbox.memory,
        tasks=sandbox.tasks,
    )


def grantable(p: PathRule) -> bool:
    """Whether an allow rule says exactly what a grant on a path means: that path and all below it.

    `/a` means /a alone, which is the same for a file, and less for a folder: the launch grants it
    for files only.
    """
    return p.shape is Shape.TREE or p.shape is Shape.PATH


def opens_folder(p: PathRule) -> bool:
    """Whether an allow rule makes a folder writable: all of it, for all that writing is."""
    return p.shape is Shape.TREE and p.bits & CHANGE == CHANGE and folder_problem(p.prefix) is None


def _writable(sandbox: Sandbox, allowed: Sequence[PathRule]) -> tuple[str, ...] | None:
    opened = {p.prefix for p in allowed if opens_folder(p)}
    if sandbox.writable is None and not opened:
        return None
    return tuple(sorted({*(sandbox.writable or (".",)), *opened}))


def _granted(allowed: Sequence[PathRule], bit: Bits) -> tuple[str, ...]:
    """Paths with `/**` behind those that are granted with all below them."""
    return tuple(
        sorted(
            {
                f"{p.prefix.rstrip('/')}/**" if p.shape is Shape.TREE else p.prefix
                for p in allowed
                if p.bits & bit
            }
        )
    )


# -- paths of a run ----------------------------------------------------------------------------


def absolute(path: str, *, home: str, directory: str) -> str:
    """A path of a share where a run has it; "" when it has no home."""
    if path == "~" or path.startswith("~/"):
        return home + path[1:] if home.startswith("/") else ""
    return directory if path == "." else posixpath.join(directory, path)


# -- reading back ------------------------------------------------------------------------------


def _closed(value: Mapping[str, Json]) -> Closed:
    return Closed(
        _text(value["path"]), _text(value["names"]), Bits(value["bits"]), _text(value["rule"])
    )


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _texts(value: Json) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return tuple(_text(v) for v in value)


def _number(value: Json) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is not a number")
    number: int | None = value
    return number


def _one_of(value: Json, known: Sequence[Any]) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {known}")
    return value
