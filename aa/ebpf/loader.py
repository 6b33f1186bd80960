"""Loads the BPF programs, attaches them to the agents' slices, pins everything, and says what is not in place.

What is pinned outlives the service: a restart takes the maps over and puts the new
programs where the old ones are, without a moment in which neither runs. Cgroup links
change their program by BPF_LINK_UPDATE; programs on tracepoints are attached beside
the old ones and keep silent until the generation in the configuration names them.

The program on system calls costs every task of the machine a little, so it is attached
while somebody asks for it only (`watch_files`).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from aa import cgroup, paths
from aa.ebpf import libbpf, tables
from aa.ebpf.events import LAYOUT
from aa.ebpf.libbpf import BpfError, BpfObject
from aa.ebpf.tables import Config, Count, End

PIN_DIR = paths.RUNTIME_DIR / "bpf"
"""A bpffs of its own mount unit; see units/run-agent\\x2dassembly-bpf.mount."""

BPF_FS_MAGIC = 0xCAFE4A11
STATFS_BYTES = 256  # more than struct statfs has on any architecture

SHARED_MAPS = ("aa_config", "aa_events", "aa_counts", "aa_tallies", "aa_ends")

log = logging.getLogger(__name__)


class Place(enum.Enum):
    """What a program is attached to."""

    TRACEPOINT = "tracepoint"
    CALLS = "system calls"  # while `watch_files` wants them
    AGENTS = "aa-agents.slice"
    PROXY = "aa-agents-proxy.slice"
    NOTHING = "nothing"  # is run by the loader


@dataclass(frozen=True, slots=True)
class Program:
    name: str
    object: str
    place: Place


OBSERVE = "observe.bpf.o"
GUARD = "guard_cgroup.bpf.o"

PROGRAMS = (
    Program("aa_egress", GUARD, Place.PROXY),
    Program("aa_sock_create", GUARD, Place.PROXY),
    Program("aa_setsockopt", GUARD, Place.PROXY),
    Program("aa_on_exec", OBSERVE, Place.TRACEPOINT),
    Program("aa_on_exit", OBSERVE, Place.TRACEPOINT),
    Program("aa_on_foreign_connect", OBSERVE, Place.TRACEPOINT),
    Program("aa_on_file", OBSERVE, Place.CALLS),
    Program("aa_connect4", OBSERVE, Place.AGENTS),
    Program("aa_connect6", OBSERVE, Place.AGENTS),
    Program("aa_sendmsg4", OBSERVE, Place.AGENTS),
    Program("aa_sendmsg6", OBSERVE, Place.AGENTS),
    Program("aa_own_level", OBSERVE, Place.NOTHING),
)
OPTIONAL = frozenset({"aa_own_level"})
"""Without these a rung can still be reached."""
TRACING = (Place.TRACEPOINT, Place.CALLS)


class NoPinDirectory(Exception):
    """The place for the pins is not what it must be; says how to mend it."""


class AlreadyRunning(Exception):
    """Another loader holds the pins."""


@dataclass(frozen=True, slots=True)
class Slices:
    """The agents' slices as paths below `root`; tests have their own."""

    root: Path = paths.CGROUP_ROOT
    agents: str = paths.AGENTS_SLICE
    proxy: str = paths.PROXY_SLICE

    def path(self, place: Place) -> str:
        return self.proxy if place is Place.PROXY else self.agents

    def id(self, place: Place) -> int | None:
        return cgroup.cgroup_id(self.path(place), self.root)


@dataclass(slots=True)
class _Loaded:
    """A program in the kernel, and the link that holds it in place once there is one."""

    fd: int
    attach_type: int
    link: int | None = None


class Loader:
    """The programs and maps of this host. One at a time: it holds a lock on the pins."""

    def __init__(
        self,
        *,
        pins: Path = PIN_DIR,
        objects: Path = paths.BPF_OBJECTS_DIR,
        slices: Slices | None = None,
    ) -> None:
        self.slices = slices or Slices()
        self.pins = pins
        self.refused: dict[str, str] = {}
        """Programs that this kernel does not take, and its words for it."""
        self._objects = objects
        self._links_dir = pins / "links"
        self._maps_dir = pins / f"maps-{LAYOUT}"
        self._programs: dict[str, _Loaded] = {}
        self._maps: dict[str, int] = {}
        self._lock = -1
        self._config = Config()
        self._ends: frozenset[bytes] = frozenset()
        self._cpus = 0
        self.files_watched = False
        """Whether file calls are to be seen; a life that was killed may have left it so."""

    # -- life

    def open(self) -> None:
        """Takes the pins. Raises `NoPinDirectory`, `AlreadyRunning`."""
        require_bpffs(self.pins)
        self._lock = os.open(self.pins, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise AlreadyRunning(f"another loader works on {self.pins}") from None
        for directory in (self._links_dir, self._maps_dir):
            directory.mkdir(mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Lets go. Everything pinned stays and keeps working."""
        descriptors = [p.fd for p in self._programs.values()]
        descriptors += [p.link for p in self._programs.values() if p.link is not None]
        descriptors += [*self._maps.values(), self._lock]
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)
        self._programs.clear()
        self._maps.clear()
        self._lock = -1

    def load(self, ends: Iterable[End]) -> None:
        """Loads what the kernel takes, fills the tables, and attaches it all.

        Nothing of it raises for one refused program: see `refused` and `problems`.
        Raises `BpfError` when not even the shared maps can be made.
        """
        self._cpus = libbpf.possible_cpus()
        held = self._pinned_config()
        generation = held.generation % 0xFFFFFFFF + 1
        for name in (OBSERVE, GUARD):
            self._load_object(name, generation)
        self._ends = frozenset(end.pack() for end in ends)
        self._set_ends()
        # The old tracing programs speak until the new ones are in place.
        self._config = replace(held, pidns=os.stat("/proc/self/ns/pid").st_ino, canary=0)
        self._aim()
        fresh = self._attach_tracing()
        self._configure(generation=generation)
        for program, link in fresh.items():
            self._pin_link(program, link)
        self._sweep()

    def watch_files(self, wanted: bool) -> bool:
        """Attaches the programs on system calls, or takes them out. True when that changed anything.

        What cannot be attached shows in `problems`.
        """
        changed = False
        self.files_watched = wanted
        for program in PROGRAMS:
            loaded = self._programs.get(program.name)
            if program.place is not Place.CALLS or loaded is None:
                continue
            if wanted and self._problem(program, None):
                changed |= self._attach_call(program.name, loaded)
            elif not wanted and loaded.link is not None:
                os.close(loaded.link)
                loaded.link = None
                (self._links_dir / program.name).unlink(missing_ok=True)
                changed = True
        return changed

    def _attach_call(self, name: str, loaded: _Loaded) -> bool:
        try:
            self._pin_link(name, libbpf.attach_tracing(loaded.fd))
        except BpfError as e:
            self.refused[name] = str(e)
            return False
        return True

    def refresh(self) -> list[str]:
        """Follows the slices: attaches what is not attached to the ones of now.

        Returns what it did, in words; an empty list is the usual answer. A program that
        cannot be attached shows in `problems`.
        """
        return self._set_ends() + self._aim()

    def announce_canary(self, cgroup: int) -> None:
        """Keeps room in the ring for the canary in this cgroup, until the next is announced."""
        self._configure(canary=cgroup)

    # -- what is the case

    def problems(self, place: Place) -> list[str]:
        """What is missing at one place, in words. Asks the kernel, not our memory."""
        if place is Place.CALLS and not self.files_watched:
            return []
        wanted = self.slices.id(place) if place in (Place.AGENTS, Place.PROXY) else None
        if place in (Place.AGENTS, Place.PROXY) and wanted is None:
            return [f"{place.value} does not exist"]
        found = []
        for program in PROGRAMS:
            if program.place is not place or program.name in OPTIONAL:
                continue
            problem = self._problem(program, wanted)
            if problem:
                found.append(f"{program.name}: {problem}")
        if place is Place.PROXY and "aa_ends" in self._maps and self.ends != self._ends:
            found.append("the table of the proxy's ends is not ours")
        if place is Place.TRACEPOINT and self.config.slice != (self.slices.id(Place.AGENTS) or 0):
            found.append("the configuration names another slice")
        return found

    def _problem(self, program: Program, wanted: int | None) -> str:
        if program.name in self.refused:
            return self.refused[program.name]
        loaded = self._programs.get(program.name)
        if loaded is None:
            return "not loaded"
        if loaded.link is None:
            return "not attached"
        if not (self._links_dir / program.name).exists():
            return "not pinned"
        try:
            info = libbpf.link_info(loaded.link)
            if info.program_id != libbpf.program_info(loaded.fd).id:
                return "another program is in its place"
        except BpfError as e:
            return str(e)
        if wanted is not None and info.cgroup_id != wanted:
            return "attached to a slice that is gone"
        return ""

    @property
    def config(self) -> Config:
        """What the kernel holds now."""
        raw = libbpf.map_lookup(self._maps["aa_config"], tables.index(0), tables.CONFIG_SIZE)
        return Config.unpack(raw) if raw else Config()

    @property
    def ends(self) -> frozenset[bytes]:
        return frozenset(libbpf.map_keys(self._maps["aa_ends"], tables.END_SIZE))

    @property
    def ring_fd(self) -> int:
        return self._maps["aa_events"]

    def map_fd(self, name: str) -> int:
        return self._maps[name]

    def counts(self) -> dict[int, Count]:
        """What the programs counted since the maps exist, by kind of event."""
        fd, size = self._maps["aa_counts"], tables.COUNT_SIZE * self._cpus
        found = {}
        for kind in range(1, tables.KINDS):
            raw = libbpf.map_lookup(fd, tables.index(kind), size)
            if raw and any(raw):
                found[kind] = Count.sum_of(raw)
        return found

    def tallies(self) -> dict[bytes, int]:
        """What is tallied now: total by raw key."""
        items = libbpf.map_items(
            self._maps["aa_tallies"], TALLY_KEY_SIZE, tables.TALLY.size, tables.MAX_TALLIES
        )
        return {key: tables.tally_total(value) for key, value in items.items()}

    def missed(self) -> int:
        """How often a tracing program of ours could not run; each is an event that nobody saw."""
        tracing = (p.name for p in PROGRAMS if p.place in TRACING)
        loaded = (self._programs[name] for name in tracing if name in self._programs)
        return sum(libbpf.program_info(p.fd).missed for p in loaded)

    def shared_maps(self) -> dict[str, Path]:
        """Where the maps are pinned that any object may share."""
        return {name: self._maps_dir / name for name in SHARED_MAPS if name in self._maps}

    def pinned_map(self, name: str, make: Mapping[str, int]) -> int:
        """A map of the loader's own that shall outlive it; `make` is for `bpf_map_create`."""
        path = self._maps_dir / name
        fd = libbpf.get_pinned(path)
        if fd is None:
            fd = libbpf.map_create(name, **make)
            libbpf.pin(fd, path)
        self._maps[name] = fd
        return fd

    # -- loading

    def _pinned_config(self) -> Config:
        fd = libbpf.get_pinned(self._maps_dir / "aa_config")
        if fd is None:
            return Config()
        try:
            raw = libbpf.map_lookup(fd, tables.index(0), tables.CONFIG_SIZE)
        finally:
            os.close(fd)
        return Config.unpack(raw) if raw else Config()

    def _load_object(self, name: str, generation: int) -> None:
        """Loads all programs of an object that the kernel takes: all at once, or else each is tried."""
        wanted = frozenset(p.name for p in PROGRAMS if p.object == name)
        try:
            with BpfObject(self._objects / name) as bpf:
                missing = wanted - bpf.programs().keys()
            self.refused |= dict.fromkeys(missing, f"is not in {name}")
            wanted -= missing
            self._load_programs(name, wanted, generation)
            return
        except BpfError as e:
            log.warning("%s", e)
        taken = set()
        for program in sorted(wanted):
            try:
                self._load_programs(name, frozenset({program}), generation, keep=False)
                taken.add(program)
            except BpfError as e:
                self.refused[program] = str(e)
        if taken:
            self._load_programs(name, frozenset(taken), generation)

    def _load_programs(
        self, name: str, wanted: frozenset[str], generation: int, *, keep: bool = True
    ) -> None:
        with BpfObject(self._objects / name) as bpf:
            bpf.select(wanted)
            for shared in SHARED_MAPS:
                bpf.pin_map(shared, self._maps_dir / shared)
            bpf.set_constant(generation)
            bpf.load()
            if not keep:
                return
            for program in sorted(wanted):
                self._programs[program] = _Loaded(bpf.program_fd(program), bpf.attach_type(program))
            for shared in SHARED_MAPS:
                if shared not in self._maps:
                    fd = libbpf.get_pinned(self._maps_dir / shared)
                    if fd is not None:
                        self._maps[shared] = fd

    def _set_ends(self) -> list[str]:
        if "aa_ends" not in self._maps:
            return []
        fd, held = self._maps["aa_ends"], self.ends
        for key in self._ends - held:
            libbpf.map_update(fd, key, b"\1")
        for key in held - self._ends:
            libbpf.map_delete(fd, key)
        return [] if held == self._ends else ["the table of the proxy's ends put right"]

    def _configure(self, **changes: int) -> None:
        config = replace(self._config, **changes)
        if config != self._config or config != self.config:
            libbpf.map_update(self._maps["aa_config"], tables.index(0), config.pack())
        self._config = config

    # -- attaching

    def _aim(self) -> list[str]:
        """Names the slice of now to the programs and attaches the cgroup programs to it."""
        done = []
        agents = self.slices.id(Place.AGENTS) or 0
        if agents != self._config.slice:
            if self._config.slice:
                done.append(f"{Place.AGENTS.value} was made again")
            self._configure(slice=agents, level=self._level() if agents else 0)
        elif self._config != self.config:
            self._configure()
        for place in (Place.PROXY, Place.AGENTS):
            done += self._attach_to_slice(place)
        return done

    def _attach_to_slice(self, place: Place) -> list[str]:
        wanted = self.slices.id(place)
        if wanted is None:
            return []
        done = []
        for program in PROGRAMS:
            loaded = self._programs.get(program.name)
            if program.place is not place or loaded is None:
                continue
            if not self._problem(program, wanted):
                continue
            try:
                done.append(self._attach_cgroup(program, loaded, wanted))
            except (BpfError, OSError) as e:
                log.error("%s: %s", program.name, e)
        return done

    def _attach_cgroup(self, program: Program, loaded: _Loaded, wanted: int) -> str:
        """Puts a program behind the pinned link if that is at the right cgroup, else makes a new one."""
        pinned = libbpf.get_pinned(self._links_dir / program.name)
        if pinned is not None:
            if libbpf.link_info(pinned).cgroup_id == wanted:
                libbpf.update_link(pinned, loaded.fd)
                self._keep(loaded, pinned)
                return f"{program.name} replaced"
            os.close(pinned)
        path = self.slices.root / self.slices.path(program.place)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link = libbpf.attach_cgroup(loaded.fd, fd, loaded.attach_type)
        finally:
            os.close(fd)
        self._pin_link(program.name, link)
        return f"{program.name} attached to {program.place.value}"

    def _attach_tracing(self) -> dict[str, int]:
        fresh = {}
        for program in PROGRAMS:
            loaded = self._programs.get(program.name)
            if program.place not in TRACING or loaded is None:
                continue
            if program.place is Place.CALLS:
                if not (self._links_dir / program.name).exists():
                    continue
                self.files_watched = True
            try:
                fresh[program.name] = libbpf.attach_tracing(loaded.fd)
            except BpfError as e:
                self.refused[program.name] = str(e)
        return fresh

    def _pin_link(self, name: str, link: int) -> None:
        """Pins a link in the place of an older one in one step; the older one ends with it."""
        path = self._links_dir / name
        beside = self._links_dir / f"{name}-new"
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # left by a loader that was killed
        libbpf.pin(link, beside)
        beside.rename(path)
        self._keep(self._programs[name], link)

    @staticmethod
    def _keep(loaded: _Loaded, link: int) -> None:
        if loaded.link is not None:
            os.close(loaded.link)
        loaded.link = link

    def _sweep(self) -> None:
        """Removes what older versions pinned and this one has no use for."""
        known = {p.name for p in PROGRAMS}
        for pin in self._links_dir.iterdir():
            if pin.name not in known:
                pin.unlink()
        for directory in self.pins.glob("maps-*"):
            if directory != self._maps_dir:
                shutil.rmtree(directory)

    def _level(self) -> int:
        """How deep the agents' slice is below the root of all cgroups."""
        depth = _depth(self.slices.agents) + _mount_depth(self.slices.root)
        program = self._programs.get("aa_own_level")
        if program is None:
            return depth  # right wherever the cgroup namespace begins at the root
        own = Path("/proc/self/cgroup").read_text().rsplit("0::", 1)[-1].strip()
        return libbpf.run_program(program.fd) - _depth(own) + depth


TALLY_KEY_SIZE = 32


def require_bpffs(path: Path) -> None:
    """Raises `NoPinDirectory` unless `path` is a bpffs that only root can enter."""
    hint = f"start the mount unit of {path}, or: mount -t bpf -o mode=0700 bpf {path}"
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(STATFS_BYTES)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        raise NoPinDirectory(f"{path}: {os.strerror(ctypes.get_errno())}; {hint}")
    if ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF != BPF_FS_MAGIC:
        raise NoPinDirectory(f"{path} is no bpffs; {hint}")
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise NoPinDirectory(f"{path} is open to others; {hint}")


def unload(pins: Path = PIN_DIR) -> list[str]:
    """Removes every pin, and with it every program and map. Returns what went."""
    require_bpffs(pins)
    gone = []
    ours = (d for d in sorted(pins.iterdir()) if d.is_dir())  # the kernel has files of its own here
    for directory in ours:
        gone += [f"{directory.name}/{pin.name}" for pin in sorted(directory.iterdir())]
        shutil.rmtree(directory)
    return gone


def _depth(path: str) -> int:
    """How many levels down a cgroup path leads; `..` leads up, out of a cgroup namespace."""
    parts = [p for p in path.removesuffix(" (deleted)").split("/") if p]
    return sum(-1 if p == ".." else 1 for p in parts)


def _mount_depth(root: Path) -> int:
    """How deep below its namespace's root the mounted cgroup is (a bind mount may start lower)."""
    for line in _lines(Path("/proc/self/mountinfo")):
        fields = line.split(" ")
        if fields[4] == str(root):
            return _depth(fields[3])
    return 0


def _lines(path: Path) -> Iterator[str]:
    with path.open() as text:
        yield from text
