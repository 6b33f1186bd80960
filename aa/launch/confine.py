"""What the policy's share of the sandbox becomes on this host: mounts of the unit, and proofs for the shim. Pure.

A mount protects what is there when a run starts. What is missing then is told: the run may make
it. A folder around something protected is bound to itself where the run could move it away.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from aa import paths
from aa.launch.sandbox import Check, Directory, Mounts, Place, Proof, Sandbox, is_below
from aa.policy.compile import CHANGE, Bits, Share
from aa.policy.sandbox import ESSENTIAL, PRIVATE

MAX_MOUNTS = 512
"""Paths that one run is kept from. A policy that names more cannot be enforced, and no run starts."""
SHOWN = 3
"""Paths that one note names."""

LIBRARIES = (
    "/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32",
    "/usr/local/lib",
)  # fmt: skip
"""Where code is mapped from, with `exec = "deny"` too."""
FULL = ("/boot", "/efi", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/usr")
"""What `ProtectSystem=full` keeps read-only, and the links to it."""
READ_ONLY_KEY = "[sandbox] read_only"
"""Who says so, where no rule does."""


class Unenforceable(Exception):
    """The policy asks for something that this host cannot hold a run to, so the run does not start."""


class Kind(enum.StrEnum):
    """What a path was when the run's user looked."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"  # on the way is a link that is not the system's
    MISSING = "missing"
    UNREACHABLE = "unreachable"  # for that user


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the run's user is to look at: a path of the share, or the names in it that fit a glob."""

    path: str
    names: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """A path as the run's user saw it, without the system's own links in it."""

    path: str
    kind: Kind
    device: int = 0
    inode: int = 0
    above: tuple[Directory, ...] = ()
    """The folders around it, outermost first."""

    @property
    def there(self) -> bool:
        return self.kind in (Kind.FILE, Kind.FOLDER)

    @property
    def place(self) -> Directory:
        return Directory(self.path, self.device, self.inode)


View = Mapping[Wanted, tuple[Seen, ...]]


def wanted(share: Share) -> tuple[Wanted, ...]:
    """Every path of a share that a mount or a grant is about, once."""
    found = [Wanted(c.path, c.names) for c in share.closed]
    found += [Wanted(path) for path in share.read_only]
    found += [_granted(path) for path in (*share.readable, *share.executable)]
    return tuple(dict.fromkeys(found))


def _granted(path: str) -> Wanted:
    return Wanted(path.removesuffix("/**") or "/")


def confined(
    box: Sandbox, share: Share, view: View, *, home: str, interpreter: str
) -> tuple[Sandbox, list[str]]:
    """The sandbox with what the share takes from it, and what a person should know of that.

    `interpreter` is the shim's own program, without links. Raises Unenforceable.
    """
    if share.user_namespaces:
        raise Unenforceable(
            'user_namespaces = "allow" means no Landlock, and then needs programs in the kernel '
            "(rung lsm or fmod_ret) that this version does not have"
        )
    closures = _closures(share, view)
    _refuse_impossible(closures, box, interpreter)
    notes: list[str] = []
    box = replace(box, file=share.file, exec=share.exec, memory=share.memory, tasks=share.tasks)
    box = _narrowed(box, closures, notes)
    tops = (*box.writable, *((home,) if share.file == "allow" else ()))
    box = _with_mounts(box, closures, tops, interpreter, notes)
    if share.file == "deny":
        box = replace(box, readable=_grants(share.readable, view))
    if share.exec == "deny":
        box = _without_exec(box, _grants(share.executable, view), closures, tops, interpreter)
    _refuse_too_many(box.mounts)
    return box, notes


# -- what is closed ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Closure:
    """A path, what must not be done to it, and who says so."""

    seen: Seen
    bits: Bits
    rules: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.seen.path

    @property
    def by(self) -> str:
        return ", ".join(self.rules)

    def covers(self, path: str) -> bool:
        return is_below(path, self.path)


def _closures(share: Share, view: View) -> tuple[_Closure, ...]:
    """By path, with all that its rules say together."""
    asked = [(Wanted(c.path, c.names), c.bits, c.rule) for c in share.closed]
    asked += [(Wanted(path), CHANGE, READ_ONLY_KEY) for path in share.read_only]
    found: dict[str, _Closure] = {}
    for what, bits, rule in asked:
        for seen in view.get(what, ()):
            old = found.get(seen.path, _Closure(seen, Bits(0), ()))
            rules = old.rules if rule in old.rules else (*old.rules, rule)
            found[seen.path] = _Closure(seen, old.bits | bits, rules)
    return tuple(found[path] for path in sorted(found))


def _refuse_impossible(closures: Sequence[_Closure], box: Sandbox, interpreter: str) -> None:
    for c in closures:
        shim = (interpreter, str(paths.LIB_DIR))
        needed = [path for path in (*ESSENTIAL, *shim) if c.covers(path)]
        if c.bits & Bits.READ and needed:
            raise Unenforceable(f"{c.by} closes {c.path}, without which nothing starts")
        if c.bits & Bits.EXEC and c.covers(interpreter) and c.path != interpreter:
            raise Unenforceable(
                f"{c.by} lets nothing in {c.path} be executed, and aa-launch's own shim is there; "
                "name the programs instead of the folder"
            )
        if c.bits & Bits.READ and c.covers(box.directory.path):
            raise Unenforceable(f"{c.by} closes the working directory {box.directory.path}")


def _narrowed(box: Sandbox, closures: Sequence[_Closure], notes: list[str]) -> Sandbox:
    """Without the writable folders that lie in what must not be written to."""

    def closing(path: str) -> _Closure | None:
        shut = Bits.WRITE | Bits.READ
        return next((c for c in closures if c.bits & shut and c.covers(path)), None)

    folders = []
    for folder in box.folders:
        c = closing(folder.path)
        if c is None:
            folders.append(folder)
        else:
            notes.append(f"{folder.path} is not writable, because {c.by} closes {c.path}")
    place = box.place
    c = closing(box.directory.path)
    if place is Place.WRITABLE and c is not None:
        place = Place.READ_ONLY
        notes.append(f"{box.directory.path} is read-only, because {c.by} closes {c.path}")
    private = tuple(path for path in box.private if closing(path) is None)
    return replace(box, folders=tuple(folders), place=place, private=private)


def _with_mounts(
    box: Sandbox,
    closures: Sequence[_Closure],
    tops: Sequence[str],
    interpreter: str,
    notes: list[str],
) -> Sandbox:
    inaccessible: list[str] = []
    read_only: list[str] = []
    no_exec: list[str] = []
    kept: dict[str, Directory] = {}
    fixed: list[Directory] = []
    checks: list[Check] = []
    missing: list[_Closure] = []
    links: list[_Closure] = []
    for c in closures:
        top = max((t for t in tops if is_below(c.path, t)), key=len, default=None)
        if top is None and any(is_below(c.path, path) for path in PRIVATE):
            continue  # a folder of the run's own, in which nothing of the host's is
        if top is not None and c.bits & ~Bits.EXEC:
            for folder in c.seen.above:
                if is_below(folder.path, top) and folder.path != top:
                    kept[folder.path] = folder
        proof = None
        if c.bits & Bits.READ:
            inaccessible.append(c.path)
            proof = Proof.CLOSED
        elif c.bits & Bits.WRITE:
            read_only.append(c.path)
            proof = Proof.READ_ONLY
        elif c.bits & Bits.DELETE and top is not None and c.seen.there:
            kept[c.path] = c.seen.place
        if c.bits & Bits.EXEC and c.path == interpreter:
            notes.append(f"{c.path} can be executed in spite of {c.by}: it is aa-launch's shim too")
        elif c.bits & Bits.EXEC and (c.seen.there or c.seen.kind is Kind.LINK):
            no_exec.append(c.path)
            if c.seen.there and not proof and _is_read_only(c.path, box.file, tops):
                fixed.append(c.seen.place)
        if c.seen.there:
            checks += [Check(c.path, proof)] if proof else []
            checks += [Check(c.path, Proof.NO_EXEC)] if c.path in no_exec and not proof else []
        elif c.seen.kind is Kind.MISSING and top is not None:
            missing.append(c)
        elif c.seen.kind is Kind.LINK:
            links.append(c)
    notes += _notes(missing, "does not exist, so the run may make it, whatever {} says")
    notes += _notes(links, "is a link: {} is held for what it leads to, not for the link")
    mounts = Mounts(
        tuple(inaccessible),
        tuple(read_only),
        tuple(no_exec),
        fixed=tuple(f.path for f in fixed),
    )
    kept_ones = tuple(kept[path] for path in sorted(kept))
    return replace(box, mounts=mounts, kept=kept_ones, fixed=tuple(fixed), checks=tuple(checks))


def _notes(closures: Sequence[_Closure], words: str) -> Iterator[str]:
    for rules, group in itertools.groupby(sorted(closures, key=lambda c: c.by), lambda c: c.by):
        found = [c.path for c in group]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"{', '.join(found[:SHOWN])}{more} {words.format(rules)}"


# -- what is granted ---------------------------------------------------------------------------


def _grants(granted: Sequence[str], view: View) -> tuple[Directory, ...]:
    """What is there of it: a folder for a path with `/**`, a file for one without."""
    found: dict[str, Directory] = {}
    for path in granted:
        kind = Kind.FOLDER if path.endswith("/**") else Kind.FILE
        for seen in view.get(_granted(path), ()):
            if seen.kind is kind:
                found[seen.path] = seen.place
    return tuple(found[path] for path in sorted(found))


def _without_exec(
    box: Sandbox,
    granted: Sequence[Directory],
    closures: Sequence[_Closure],
    tops: Sequence[str],
    interpreter: str,
) -> Sandbox:
    """Every mount without execution, but for libraries, the shim, and what rules allow."""
    shut = [c for c in closures if c.bits & Bits.EXEC and c.path != interpreter]
    executable = [g for g in granted if not any(c.covers(g.path) for c in shut)]
    opened = (interpreter, *LIBRARIES, *(g.path for g in executable))
    mounted = ("/", *PRIVATE, *box.writable, *(k.path for k in box.kept))
    closed = [
        path
        for path in dict.fromkeys((*mounted, *box.mounts.no_exec))
        if not any(is_below(path, top) for top in opened) or path in box.mounts.no_exec
    ]
    still = [path for path in opened if _is_read_only(path, box.file, tops)]
    mounts = replace(
        box.mounts,
        no_exec=tuple(closed),
        exec=tuple(path for path in opened if path not in still),
        fixed=(*box.mounts.fixed, *still),
    )
    return replace(box, mounts=mounts, executable=tuple(executable))


def _is_read_only(path: str, file: str, tops: Sequence[str]) -> bool:
    """Whether the sandbox makes what is around a path read-only."""
    if file == "allow":
        return any(is_below(path, top) for top in FULL)
    return not any(is_below(path, top) for top in (*tops, *PRIVATE))


def _refuse_too_many(mounts: Mounts) -> None:
    total = len({*mounts.inaccessible, *mounts.read_only, *mounts.no_exec})
    if total > MAX_MOUNTS:
        raise Unenforceable(
            f"the policy keeps a run from {total} paths, and no more than {MAX_MOUNTS} can be "
            "mounted over; name folders instead of files"
        )
