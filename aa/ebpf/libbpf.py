"""libbpf through ctypes: as much of it as the loader needs, from version 1.1 (Debian 12) on.

Every call here either works or raises `BpfError` with libbpf's own last words.
File descriptors that are returned belong to the caller.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

LIBRARY = "libbpf.so.1"

LOG_LINES = 40
"""Lines of libbpf's and the verifier's log that are kept for error texts."""
LOG_LINE_BYTES = 4096

_ANY = 0  # BPF_ANY
_WARN = 0  # LIBBPF_WARN


class BpfError(OSError):
    """A call of libbpf or of the kernel's bpf() failed."""

    @classmethod
    def of(cls, what: str, error: int | None = None) -> BpfError:
        number = ctypes.get_errno() if error is None else error
        said = last_words()
        text = f"{what}: {os.strerror(number)}"
        return cls(number, f"{text} ({said})" if said else text)

    def __str__(self) -> str:
        return str(self.args[1]) if len(self.args) > 1 else super().__str__()


class _TestRunOpts(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class _BatchOpts(ctypes.Structure):
    _fields_ = (("sz", c_size_t), ("elem_flags", c_uint64), ("flags", c_uint64))


class _UprobeOpts(ctypes.Structure):
    """struct bpf_uprobe_opts as it was in libbpf 1.1."""

    _fields_ = (
        ("sz", c_size_t),
        ("ref_ctr_offset", c_size_t),
        ("bpf_cookie", c_uint64),
        ("retprobe", ctypes.c_bool),
        ("func_name", c_char_p),
    )


class _LinkInfo(ctypes.Structure):
    """struct bpf_link_info as far as cgroup links go."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("_pad", c_uint32),
        ("cgroup_id", c_uint64),
        ("attach_type", c_uint32),
        ("_rest", c_char * 36),
    )


class _ProgInfo(ctypes.Structure):
    """struct bpf_prog_info up to `recursion_misses`; the kernel fills as much as is asked for."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_char * 8),
        ("_skip1", c_char * 48),
        ("name", c_char * 16),
        ("_skip2", c_char * 120),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
    )


class _ProgLoadOpts(ctypes.Structure):
    """struct bpf_prog_load_opts as far as it is used."""

    _fields_ = (
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_uint32),
    )


class _UprobeMultiLink(ctypes.Structure):
    """union bpf_attr of BPF_LINK_CREATE for BPF_TRACE_UPROBE_MULTI (Linux 6.6), which libbpf 1.1 does not know."""

    _fields_ = (
        ("prog_fd", c_uint32),
        ("target_fd", c_uint32),
        ("attach_type", c_uint32),
        ("flags", c_uint32),
        ("path", c_uint64),
        ("offsets", c_uint64),
        ("ref_ctr_offsets", c_uint64),
        ("cookies", c_uint64),
        ("cnt", c_uint32),
        ("multi_flags", c_uint32),
        ("pid", c_uint32),
        ("_pad", c_uint32),
    )


_BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}
_LINK_CREATE = 28
_PROGRAM_KPROBE = 2
UPROBE_MULTI = 48
"""BPF_TRACE_UPROBE_MULTI, the attach type of programs for `attach_uprobes`."""
_MULTI_RETURN = 1
_RETURN_0 = bytes.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit

_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
SAMPLE = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)

_log: deque[str] = deque(maxlen=LOG_LINES)


def _take_line(level: int, text: bytes, arguments: int) -> int:
    """libbpf's print hook. A va_list is a pointer or is passed as one on every 64-bit ABI we run on."""
    if level == _WARN:
        line = ctypes.create_string_buffer(LOG_LINE_BYTES)
        _libc().vsnprintf(line, LOG_LINE_BYTES, text, c_void_p(arguments))
        _log.extend(line.value.decode(errors="replace").splitlines())
    return 0


_print_hook = _PRINT(_take_line)  # must live as long as the library


def last_words() -> str:
    """What libbpf said last that is worth a person's time, in one line; then it is forgotten."""
    lines = [x.removeprefix("libbpf: ").strip() for x in _log]
    _log.clear()
    noise = ("-- ", "processed ", "failed to load object", "load bpf program failed")
    telling = [x for x in lines if x and not any(n in x for n in noise)]
    return telling[-1][:300] if telling else ""


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_INT_CALLS: dict[str, tuple[Any, ...]] = {
    "bpf_object__load": (c_void_p,),
    "bpf_program__fd": (c_void_p,),
    "bpf_program__expected_attach_type": (c_void_p,),
    "bpf_map__fd": (c_void_p,),
    "bpf_map__set_pin_path": (c_void_p, c_char_p),
    "bpf_link_create": (c_int, c_int, c_int, c_void_p),
    "bpf_link_update": (c_int, c_int, c_void_p),
    "bpf_raw_tracepoint_open": (c_char_p, c_int),
    "bpf_obj_pin": (c_int, c_char_p),
    "bpf_obj_get": (c_char_p,),
    "bpf_obj_get_info_by_fd": (c_int, c_void_p, POINTER(c_uint32)),
    "bpf_map_create": (c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_map_update_elem": (c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_lookup_elem": (c_int, c_void_p, c_void_p),
    "bpf_map_delete_elem": (c_int, c_void_p),
    "bpf_map_get_next_key": (c_int, c_void_p, c_void_p),
    "bpf_map_lookup_batch": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "bpf_prog_test_run_opts": (c_int, c_void_p),
    "bpf_link__destroy": (c_void_p,),
    "bpf_program__set_expected_attach_type": (c_void_p, c_uint32),
    "bpf_prog_load": (c_uint32, c_char_p, c_char_p, c_void_p, c_size_t, c_void_p),
    "ring_buffer__consume": (c_void_p,),
    "ring_buffer__epoll_fd": (c_void_p,),
    "libbpf_num_possible_cpus": (),
}
_POINTER_CALLS: dict[str, tuple[Any, ...]] = {
    "bpf_object__open_file": (c_char_p, c_void_p),
    "bpf_object__next_program": (c_void_p, c_void_p),
    "bpf_object__next_map": (c_void_p, c_void_p),
    "bpf_map__initial_value": (c_void_p, POINTER(c_size_t)),
    "bpf_program__attach_uprobe_opts": (c_void_p, c_int, c_char_p, c_size_t, c_void_p),
    "ring_buffer__new": (c_int, SAMPLE, c_void_p, c_void_p),
}
_TEXT_CALLS = ("bpf_program__name", "bpf_map__name")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The library with every signature declared. Raises `OSError` when it is not installed."""
    library = ctypes.CDLL(LIBRARY, use_errno=True)
    for name, arguments in _INT_CALLS.items():
        call = getattr(library, name)
        call.argtypes, call.restype = arguments, c_int
    for name, arguments in _POINTER_CALLS.items():
        call = getattr(library, name)
        call.argtypes, call.restype = arguments, c_void_p
    for name in _TEXT_CALLS:
        call = getattr(library, name)
        call.argtypes, call.restype = (c_void_p,), c_char_p
    library.bpf_program__set_autoload.argtypes = (c_void_p, ctypes.c_bool)
    library.bpf_object__close.argtypes = (c_void_p,)
    library.bpf_object__close.restype = None
    library.ring_buffer__free.argtypes = (c_void_p,)
    library.ring_buffer__free.restype = None
    library.libbpf_set_print.argtypes = (_PRINT,)
    library.libbpf_set_print.restype = c_void_p
    library.libbpf_version_string.restype = c_char_p
    library.libbpf_set_print(_print_hook)
    return library


def version() -> str:
    return bytes(_library().libbpf_version_string()).decode()


def _int(name: str, what: str, *arguments: Any) -> int:
    result = int(getattr(_library(), name)(*arguments))
    if result < 0:
        raise BpfError.of(what, -result)  # libbpf 1.x: always the negative errno
    return result


def _pointer(name: str, what: str, *arguments: Any) -> int:
    result = getattr(_library(), name)(*arguments)
    if not result:
        raise BpfError.of(what)
    return int(result)


def _path(path: Path) -> bytes:
    return os.fsencode(path)


class BpfObject:
    """An object file on its way into the kernel. Close it: the descriptors it handed out live on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._object = _pointer("bpf_object__open_file", f"open {path}", _path(path), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._object:
            _library().bpf_object__close(self._object)
            self._object = 0

    def _each(self, kind: str) -> Iterator[tuple[str, int]]:
        item = None
        while item := getattr(_library(), f"bpf_object__next_{kind}")(self._object, item):
            yield getattr(_library(), f"bpf_{kind}__name")(item).decode(), item

    def programs(self) -> dict[str, int]:
        return dict(self._each("program"))

    def select(self, wanted: frozenset[str]) -> None:
        """Loads these programs only."""
        for name, program in self._each("program"):
            _library().bpf_program__set_autoload(program, name in wanted)

    def set_attach_type(self, program: str, attach_type: int) -> None:
        """What a program is to be attached as, where its section does not say. Before `load`."""
        item = self.programs()[program]
        what = f"attach type of {program}"
        _int("bpf_program__set_expected_attach_type", what, item, attach_type)

    def pin_map(self, name: str, path: Path) -> None:
        """The map is to be the one pinned at `path`, or to be pinned there. Before `load`."""
        for found, item in self._each("map"):
            if found == name:
                _int("bpf_map__set_pin_path", f"pin path of {name}", item, _path(path))

    def set_constant(self, value: int) -> None:
        """Sets the object's one `const volatile __u32`. Before `load`."""
        for name, item in self._each("map"):
            if name.endswith(".rodata"):
                size = c_size_t()
                start = _pointer("bpf_map__initial_value", name, item, ctypes.byref(size))
                if size.value != 4:
                    raise BpfError.of(f"{self.path}: {name} has {size.value} bytes, not 4", 22)
                c_uint32.from_address(start).value = value

    def load(self) -> None:
        _log.clear()
        _int("bpf_object__load", f"load {self.path.name}", self._object)

    def program_fd(self, name: str) -> int:
        """A descriptor of a loaded program that outlives this object."""
        return os.dup(_int("bpf_program__fd", f"program {name}", self.programs()[name]))

    def attach_type(self, name: str) -> int:
        return int(_library().bpf_program__expected_attach_type(self.programs()[name]))

    def map_fd(self, name: str) -> int:
        return os.dup(_int("bpf_map__fd", f"map {name}", dict(self._each("map"))[name]))

    def attach_uprobe(
        self, program: str, file: Path, offset: int, *, back: bool, cookie: int
    ) -> UprobeLink:
        """Puts a program at an instruction of a file, for all processes that map it.

        `back`: at the return from the function there. `cookie`: what the program is told.
        """
        options = _UprobeOpts(sz=ctypes.sizeof(_UprobeOpts), bpf_cookie=cookie, retprobe=back)
        return UprobeLink(
            _pointer(
                "bpf_program__attach_uprobe_opts",
                f"probe {program}",
                self.programs()[program],
                -1,
                _path(file),
                offset,
                ctypes.byref(options),
            )
        )


class UprobeLink:
    """A probe in its place, until it is closed. It may outlive its object."""

    def __init__(self, link: int) -> None:
        self._link = link

    def close(self) -> None:
        if self._link:
            _library().bpf_link__destroy(self._link)
            self._link = 0


class UprobesLink:
    """Probes of one program in one file, until they are closed together."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def attach_uprobes(
    program_fd: int, file: Path, offsets: Sequence[int], *, back: bool, cookie: int
) -> UprobesLink:
    """Puts a program of attach type `UPROBE_MULTI` at several instructions of a file, as `attach_uprobe` does.

    Needs no capability beyond those for loading the program; a single probe goes through perf and
    needs CAP_SYS_ADMIN.
    """
    path = ctypes.create_string_buffer(_path(file))
    places = (c_uint64 * len(offsets))(*offsets)
    cookies = (c_uint64 * len(offsets))(*[cookie] * len(offsets))
    attributes = _UprobeMultiLink(
        prog_fd=program_fd,
        attach_type=UPROBE_MULTI,
        path=ctypes.addressof(path),
        offsets=ctypes.addressof(places),
        cookies=ctypes.addressof(cookies),
        cnt=len(offsets),
        multi_flags=_MULTI_RETURN if back else 0,
    )
    size = ctypes.sizeof(attributes)
    number = _BPF_SYSCALL.get(platform.machine(), -1)
    fd = _libc().syscall(
        ctypes.c_long(number), ctypes.c_long(_LINK_CREATE), ctypes.byref(attributes), c_size_t(size)
    )
    if fd < 0:
        raise BpfError.of(f"{len(offsets)} probes in {file}")
    return UprobesLink(int(fd))


def has_uprobe_multi() -> bool:
    """Whether this kernel takes `attach_uprobes`: it says so when it is asked for probes in a directory."""
    options = _ProgLoadOpts(sz=ctypes.sizeof(_ProgLoadOpts), expected_attach_type=UPROBE_MULTI)
    code = ctypes.create_string_buffer(_RETURN_0, len(_RETURN_0))
    try:
        program = _int(
            "bpf_prog_load",
            "load a program for many probes",
            _PROGRAM_KPROBE,
            b"aa_try",
            b"GPL",
            code,
            len(_RETURN_0) // 8,
            ctypes.byref(options),
        )
    except BpfError:
        return False
    try:
        attach_uprobes(program, Path("/"), [0], back=False, cookie=0).close()
    except BpfError as e:
        return e.errno == errno.EBADF  # the way is known, and a directory is no program
    finally:
        os.close(program)
    return False


@dataclass(frozen=True, slots=True)
class LinkInfo:
    type: int
    id: int
    program_id: int
    cgroup_id: int
    """Of a cgroup link; 0 when its cgroup is gone. Meaningless for others."""


def link_info(fd: int) -> LinkInfo:
    info = _LinkInfo()
    size = c_uint32(ctypes.sizeof(info))
    _int("bpf_obj_get_info_by_fd", "link info", fd, ctypes.byref(info), ctypes.byref(size))
    return LinkInfo(info.type, info.id, info.prog_id, info.cgroup_id)


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    id: int
    name: str
    tag: str
    missed: int
    """How often it did not run because it was running already on that CPU."""


def program_info(fd: int) -> ProgramInfo:
    info = _ProgInfo()
    size = c_uint32(ctypes.sizeof(info))
    _int("bpf_obj_get_info_by_fd", "program info", fd, ctypes.byref(info), ctypes.byref(size))
    raw = bytes(info)
    return ProgramInfo(info.id, info.name.decode(), raw[8:16].hex(), info.recursion_misses)


def attach_tracing(program_fd: int) -> int:
    """Attaches a tp_btf program to the tracepoint it was built for; a link's descriptor."""
    return _int("bpf_raw_tracepoint_open", "attach", None, program_fd)


def attach_cgroup(program_fd: int, cgroup_fd: int, attach_type: int) -> int:
    return _int("bpf_link_create", "attach", program_fd, cgroup_fd, attach_type, None)


def update_link(link_fd: int, program_fd: int) -> None:
    """Puts another program behind a link, atomically. For cgroup links."""
    _int("bpf_link_update", "replace the program", link_fd, program_fd, None)


def pin(fd: int, path: Path) -> None:
    _int("bpf_obj_pin", f"pin {path}", fd, _path(path))


def get_pinned(path: Path) -> int | None:
    """A descriptor of what is pinned at `path`, None when nothing is."""
    try:
        return _int("bpf_obj_get", f"open {path}", _path(path))
    except BpfError as e:
        if e.errno == 2:  # ENOENT
            return None
        raise


def run_program(fd: int) -> int:
    """Runs a program of type `syscall` once, on the calling thread; what it returned."""
    options = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts))
    _int("bpf_prog_test_run_opts", "run a program", fd, ctypes.byref(options))
    return int(options.retval)


def possible_cpus() -> int:
    return _int("libbpf_num_possible_cpus", "count the CPUs")


MAP_HASH = 1  # enum bpf_map_type
MAP_ARRAY = 2


def map_create(name: str, *, type: int, key: int, value: int, entries: int) -> int:
    """A new map; sizes in bytes."""
    return _int(
        "bpf_map_create", f"make map {name}", type, name.encode(), key, value, entries, None
    )


def map_update(fd: int, key: bytes, value: bytes) -> None:
    _int("bpf_map_update_elem", "write a map", fd, key, value, _ANY)


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value, None where there is no such key. Per-CPU values come in a row."""
    value = ctypes.create_string_buffer(value_size)
    try:
        _int("bpf_map_lookup_elem", "read a map", fd, key, value)
    except BpfError as e:
        if e.errno == 2:
            return None
        raise
    return value.raw


def map_delete(fd: int, key: bytes) -> None:
    """Removes a key; it is no error when there is none."""
    try:
        _int("bpf_map_delete_elem", "delete from a map", fd, key)
    except BpfError as e:
        if e.errno != 2:
            raise


def map_keys(fd: int, key_size: int) -> Iterator[bytes]:
    """The keys of a map that nobody else changes meanwhile."""
    key: Any = None
    while True:
        following = ctypes.create_string_buffer(key_size)
        try:
            _int("bpf_map_get_next_key", "list a map", fd, key, following)
        except BpfError as e:
            if e.errno == 2:
                return
            raise
        yield following.raw
        key = following


def map_items(fd: int, key_size: int, value_size: int, limit: int) -> dict[bytes, bytes]:
    """What a hash map holds now, in as few calls as the kernel allows; at most `limit` entries."""
    keys = ctypes.create_string_buffer(key_size * limit)
    values = ctypes.create_string_buffer(value_size * limit)
    options = _BatchOpts(sz=ctypes.sizeof(_BatchOpts))
    cursor = ctypes.create_string_buffer(max(4, key_size))
    found: dict[bytes, bytes] = {}
    start: Any = None
    while len(found) < limit:
        count = c_uint32(limit)
        done = False
        try:
            _int(
                "bpf_map_lookup_batch",
                "read a map",
                fd,
                start,
                cursor,
                keys,
                values,
                ctypes.byref(count),
                ctypes.byref(options),
            )
        except BpfError as e:
            if e.errno != 2:  # ENOENT: that was the last of it
                raise
            done = True
        some_keys, some_values = keys.raw, values.raw
        for i in range(count.value):
            key = some_keys[i * key_size : (i + 1) * key_size]
            found[key] = some_values[i * value_size : (i + 1) * value_size]
        if done:
            break
        start = cursor
    return found


class Ring:
    """The reading end of a ring buffer. One reader at a time, in any thread.

    `take` gets each record as bytes and returns False to stop after it.
    """

    def __init__(self, map_fd: int, take: Callable[[bytes], bool]) -> None:
        def sample(_: int, data: int, size: int) -> int:
            return 0 if take(ctypes.string_at(data, size)) else -1

        self._sample = SAMPLE(sample)  # must live as long as the ring
        self._ring = _pointer("ring_buffer__new", "open the ring", map_fd, self._sample, None, None)

    def fileno(self) -> int:
        """Readable when there are records."""
        return _int("ring_buffer__epoll_fd", "ring", self._ring)

    def consume(self) -> bool:
        """Hands over what there is. True when the ring was emptied, False when `take` stopped it."""
        return int(_library().ring_buffer__consume(self._ring)) >= 0

    def close(self) -> None:
        if self._ring:
            _library().ring_buffer__free(self._ring)
            self._ring = 0
