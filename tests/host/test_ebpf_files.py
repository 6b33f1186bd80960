"""Which files governed programs write, make, remove and rename, and that nothing is seen of others."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aa.ebpf import events
from aa.ebpf.events import Exec, File, Files, Mapped, Net
from aa.ebpf.loader import Loader, Place
from tests.host.ebpf_world import Recorder, World, ids, sh

SYSCALL = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    def call(number, *arguments):
        words = [ctypes.c_char_p(x) if isinstance(x, bytes) else ctypes.c_long(x) for x in arguments]
        if libc.syscall(ctypes.c_long(number), *words) == -1:
            raise OSError(ctypes.get_errno(), "")
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.make("f")
    yield world
    world.close()


@pytest.fixture(scope="module")
def loader(world: World) -> Iterator[Loader]:
    loader = world.loader()
    assert not loader.refused
    loader.watch_files(True)
    assert loader.problems(Place.CALLS) == []
    yield loader
    loader.close()


@pytest.fixture
def recorder(loader: Loader) -> Iterator[Recorder]:
    recorder = Recorder(loader)
    recorder.read()
    recorder.events.clear()
    yield recorder
    recorder.close()


@pytest.fixture
def run(world: World, request: pytest.FixtureRequest) -> Path:
    """Each test's own: the rate of one is not another's."""
    return world.run_dir(world.local, f"aa-agent-{request.node.name}.service")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Without a symbolic link above it, so that a path is what it is."""
    return tmp_path.resolve()


@pytest.fixture
def seen(recorder: Recorder, folder: Path) -> Callable[..., File]:
    """The one event of a path in the test's folder."""

    def find(name: str, **wanted: object) -> File:
        path = str(folder / name)

        def fits(e: File) -> bool:
            return e.path == path and all(getattr(e, k) == v for k, v in wanted.items())

        found = recorder.find(File, fits)
        assert found is not None, [e for e in recorder.events if isinstance(e, File)]
        return found

    return find


Seen = Callable[..., File]


def test_sees_a_file_that_is_made_and_one_that_is_written(
    world: World, run: Path, folder: Path, seen: Seen
) -> None:
    world.python(
        run, "open(sys.argv[1], 'w').close(); open(sys.argv[1], 'a').close()", f"{folder}/x"
    )
    made = seen("x", access="create")
    assert made.action == "open" and made.call == "openat" and made.error == 0
    assert made.exact
    assert made.inode == (folder / "x").stat().st_ino
    assert made.head.cgroup == ids(run) and made.head.pid > 0 and made.head.comm == "python3"
    written = seen("x", access="write")
    assert written.flags & os.O_APPEND and written.inode == made.inode


def test_sees_no_reading(
    world: World, run: Path, folder: Path, seen: Seen, recorder: Recorder
) -> None:
    (folder / "r").write_text("old")
    code = """
    open(sys.argv[1]).read()
    os.close(os.open(sys.argv[1], os.O_PATH | os.O_RDWR))
    open("/dev/null", "w").close()
    open(sys.argv[1] + "-end", "w")
    """
    world.python(run, code, f"{folder}/r")
    seen("r-end")
    paths = {e.path for e in recorder.read() if isinstance(e, File)}
    assert paths == {f"{folder}/r-end"}


def test_sees_nothing_of_an_ungoverned_program(
    world: World, run: Path, folder: Path, seen: Seen, recorder: Recorder
) -> None:
    code = "open(sys.argv[1], 'w'); os.rename(sys.argv[1], sys.argv[1] + '2'); os.unlink(sys.argv[1] + '2')"
    world.python(world.outside, code, f"{folder}/o")
    world.python(run, code, f"{folder}/i")
    seen("i2", action="unlink")
    files = [e for e in recorder.read() if isinstance(e, File)]
    assert [e.action for e in files] == ["open", "rename", "unlink"]
    assert {e.head.cgroup for e in files} == {ids(run)}


def test_sees_removal_of_files_and_directories(
    world: World, run: Path, folder: Path, seen: Seen
) -> None:
    code = """
    os.chdir(sys.argv[1])
    for name in ("a", "b", "c"):
        open(name, "w").close()
    os.mkdir("d"); os.mkdir("e")
    os.unlink("a")
    here = os.open(".", os.O_RDONLY)
    os.unlink("b", dir_fd=here)
    os.unlink(sys.argv[1] + "/c")
    os.rmdir("d")
    os.rmdir("e", dir_fd=here)
    """
    world.python(run, code, str(folder))
    for name in ("a", "b", "c", "d", "e"):
        gone = seen(name, action="unlink")
        assert gone.error == 0 and not gone.exact
    assert seen("d", action="open").call == "mkdir"
    assert seen("e", action="unlink").flags & events.AT_REMOVEDIR


def test_sees_what_a_file_is_renamed_to(world: World, run: Path, folder: Path, seen: Seen) -> None:
    (folder / "old").mkdir()
    (folder / "new").mkdir()
    code = """
    os.chdir(sys.argv[1])
    open("old/x", "w").close()
    os.rename("old/x", "new/y")
    old, new = os.open("old", os.O_RDONLY), os.open("new", os.O_RDONLY)
    os.rename("y", "z", src_dir_fd=new, dst_dir_fd=old)
    """
    world.python(run, code, str(folder))
    assert seen("old/x", action="rename").to == f"{folder}/new/y"
    moved = seen("new/y", action="rename")
    assert moved.to == f"{folder}/old/z"
    assert moved.error == 0 and (folder / "old/z").exists()


def test_sees_a_failed_attempt_with_its_error(
    world: World, run: Path, folder: Path, seen: Seen
) -> None:
    code = """
    os.chdir(sys.argv[1])
    attempt(os.unlink, "nothing")
    attempt(open, "no/where", "w")
    attempt(os.rename, "this", "that")
    attempt(os.mkdir, "/proc/x")
    """
    world.python(run, code, str(folder))
    assert seen("nothing").error == errno.ENOENT
    asked = seen("no/where")
    assert asked.error == errno.ENOENT and asked.access == "create" and not asked.exact
    assert seen("this").to == f"{folder}/that"


def test_the_path_of_an_opened_file_is_the_kernels_own(
    world: World, run: Path, folder: Path, seen: Seen
) -> None:
    """Through a symbolic link, a descriptor's name and a name with `..` in it."""
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    code = """
    open(sys.argv[1] + "/link/../link/x", "w").close()
    f = os.open(sys.argv[1] + "/link/x", os.O_RDONLY)
    os.close(os.open(f"/proc/self/fd/{f}", os.O_RDWR))
    os.unlink(sys.argv[1] + "/link/x")
    """
    world.python(run, code, str(folder))
    assert seen("real/x", access="create").exact
    assert seen("real/x", access="write").exact
    assert not seen("link/x", action="unlink").exact, "as asked for: its way is not known"


def test_sees_what_a_bind_mount_shows(world: World, run: Path, folder: Path, seen: Seen) -> None:
    """A run's paths are those of its own mount namespace."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    script = f"mount --bind {folder}/a {folder}/b && cd {folder}/b && echo > x && rm x"
    world.do(run, "unshare", "--mount", "sh", "-c", script)
    assert seen("b/x", action="open").exact
    seen("b/x", action="unlink")


def test_sees_a_file_through_each_call(
    world: World, run: Path, folder: Path, recorder: Recorder
) -> None:
    code = (
        SYSCALL
        + f"""
    import struct
    top = {str(folder)!r}.encode() + b"/"
    how = ctypes.create_string_buffer(struct.pack("QQQ", os.O_WRONLY | os.O_CREAT, 0o600, 0))
    here = os.open(top, os.O_RDONLY)
    call(2, top + b"open", os.O_WRONLY | os.O_CREAT, 0o600)
    call(85, top + b"creat", 0o600)
    call(437, here, b"openat2", ctypes.addressof(how), 24)
    call(76, top + b"open", 0)
    call(83, top + b"mkdir", 0o700)
    call(258, here, b"mkdirat", 0o700)
    call(133, top + b"mknod", 0o100600, 0)
    call(259, here, b"mknodat", 0o100600, 0)
    call(86, top + b"open", top + b"link")
    call(265, here, b"open", here, b"linkat", 0)
    call(88, b"../elsewhere", top + b"symlink")
    call(266, b"elsewhere", here, b"symlinkat")
    call(264, here, b"open", here, b"renamed")
    call(316, here, b"link", here, b"linkat", 2)
    call(82, top + b"renamed", top + b"again")
    call(87, top + b"link")
    call(84, top + b"mkdir")
    """
    )
    assert world.python(run, code) == ""
    assert recorder.find(File, lambda e: e.call == "rmdir")
    files = [e for e in recorder.read() if isinstance(e, File)]
    told = [
        (e.call, e.path.removeprefix(f"{folder}/"), e.to.removeprefix(f"{folder}/")) for e in files
    ]
    assert told == [
        ("open", "open", ""),
        ("creat", "creat", ""),
        ("openat2", "openat2", ""),
        ("truncate", "open", ""),
        ("mkdir", "mkdir", ""),
        ("mkdirat", "mkdirat", ""),
        ("mknod", "mknod", ""),
        ("mknodat", "mknodat", ""),
        ("link", "link", "open"),
        ("linkat", "linkat", "open"),
        ("symlink", "symlink", "../elsewhere"),
        ("symlinkat", "symlinkat", "elsewhere"),
        ("renameat", "open", "renamed"),
        ("renameat2", "link", "linkat"),
        ("rename", "renamed", "again"),
        ("unlink", "link", ""),
        ("rmdir", "mkdir", ""),
    ]
    assert {e.error for e in files} == {0}
    assert {e.access for e in files if e.call in ("open", "creat", "openat2", "link")} == {"create"}
    assert {e.access for e in files if e.call == "truncate"} == {"write"}


def test_tells_once_of_a_library_that_is_mapped(
    world: World, run: Path, folder: Path, recorder: Recorder
) -> None:
    library = folder / "own.so"
    shutil.copy(next(Path("/usr/lib").glob("*/libbz2.so.1.0")), library)
    inode = library.stat().st_ino
    code = "import ctypes; ctypes.CDLL(sys.argv[1])"
    world.python(world.outside, code, str(library))
    for _ in range(3):
        world.python(run, code, str(library))
    world.do(run, "/bin/echo", "end")
    assert recorder.find(Exec, lambda e: "end" in e.argv)
    assert recorder.count(Mapped, lambda e: e.inode == inode) == 1
    seen = recorder.find(Mapped, lambda e: e.inode == inode)
    assert seen is not None and seen.head.cgroup == ids(run) and seen.head.pid > 0
    assert recorder.count(File) == 0


def test_hostile_names_are_no_obstacle(
    world: World, run: Path, folder: Path, recorder: Recorder, seen: Seen
) -> None:
    code = (
        SYSCALL
        + """
    os.chdir(sys.argv[1])
    attempt(os.unlink, "l" * 3000)
    attempt(call, 87, 0xdead0000)
    attempt(call, 263, 99, b"no-directory", 0)
    attempt(call, 263, -100, b"", 0)
    open("a\\nb\\x1b[2J", "w").close()
    open(b"\\xff\\xfe", "w").close()
    for n in range(30):
        os.mkdir("d" * 200); os.chdir("d" * 200)
    open("deep", "w").close()
    attempt(os.unlink, ".//./up/../gone")
    """
    )
    world.python(run, code, str(folder))
    last = recorder.find(File, lambda e: e.path.endswith("up/../gone"))
    assert last is not None and last.path.startswith(f"{events.MISSING}/ddd")
    long = recorder.find(File, lambda e: "llll" in e.path)
    assert long is not None and long.path.endswith(events.MISSING)
    assert long.error == errno.ENAMETOOLONG and len(long.path) < 1024 + len(str(folder)) + 9
    assert recorder.find(File, lambda e: e.error == errno.EFAULT)
    lost = recorder.find(File, lambda e: e.error == errno.EBADF)
    assert lost is not None and lost.path == f"{events.MISSING}/no-directory"
    seen("a\nb\x1b[2J")
    seen("\\xff\\xfe")
    deep = recorder.find(File, lambda e: e.path.endswith("/deep"))
    assert deep is not None and not deep.exact and deep.path.startswith(f"{events.MISSING}/")


def test_a_renamed_directory_is_followed(world: World, run: Path, folder: Path, seen: Seen) -> None:
    """The working directory is where it is when the call returns, whatever it was called before."""
    code = """
    os.makedirs(sys.argv[1] + "/one")
    os.chdir(sys.argv[1] + "/one")
    os.rename(sys.argv[1] + "/one", sys.argv[1] + "/two")
    open("x", "w").close()
    os.unlink("x")
    """
    world.python(run, code, str(folder))
    seen("two/x", action="open")
    seen("two/x", action="unlink")


def test_a_flood_is_counted_and_leaves_room_for_what_is_started(
    world: World, run: Path, folder: Path, recorder: Recorder, loader: Loader
) -> None:
    before = loader.counts()[events.FILE] if events.FILE in loader.counts() else None
    code = """
    path = sys.argv[1] + "/flood"
    for n in range(30000):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
    """
    world.python(run, code, str(folder))
    world.do(run, "/bin/echo", "after the flood")
    assert recorder.find(Exec, lambda e: "after the flood" in e.argv)
    after = loader.counts()[events.FILE]
    were = (before.events, before.lost, before.tallied) if before else (0, 0, 0)
    told, lost, tallied = (
        new - old for new, old in zip((after.events, after.lost, after.tallied), were, strict=True)
    )
    assert told + lost + tallied == 30000
    assert tallied > 0 and told > 0
    (mine,) = (
        total
        for raw, total in loader.tallies().items()
        if (key := events.tally_key(raw)).via == events.VIA_FILES and key.cgroup == ids(run)
    )
    assert mine == tallied
    assert recorder.count(Net) == 0, "what is only counted is not told in the ring"
    raw = next(r for r in loader.tallies() if events.tally_key(r).via == events.VIA_FILES)
    assert isinstance(events.of_tally(raw, 5, 0), Files)


def test_the_program_is_taken_out_and_put_in_again(
    world: World, run: Path, folder: Path, loader: Loader, recorder: Recorder, seen: Seen
) -> None:
    pin = world.pins / "links" / "aa_on_file"
    assert loader.watch_files(False)
    assert not loader.watch_files(False)
    assert not pin.exists()
    world.python(run, "open(sys.argv[1], 'w').close()", f"{folder}/unseen")
    assert loader.watch_files(True)
    assert pin.exists()
    world.python(run, "open(sys.argv[1], 'w').close()", f"{folder}/seen")
    seen("seen")
    assert [e.path for e in recorder.read() if isinstance(e, File)] == [f"{folder}/seen"]


def test_a_32_bit_program_is_not_misread(
    world: World, run: Path, folder: Path, recorder: Recorder
) -> None:
    """Its numbers mean other calls. Runs may make none, so what it does is not told at all."""
    program = folder / "small"
    code = r"""
    int main(void) {
        const char *name = "/nonexistent";
        int result;
        __asm__ volatile("int $0x80" : "=a"(result) : "0"(87), "b"(name) : "memory"); /* swapon */
        __asm__ volatile("int $0x80" : "=a"(result) : "0"(20) : "memory"); /* getpid */
        return result <= 0;
    }
    """
    (folder / "small.c").write_text(code)
    sh("gcc", "-o", str(program), str(folder / "small.c"))
    recorder.read()
    recorder.events.clear()
    world.do(run, str(program))
    world.do(run, "/bin/echo", "end")
    assert recorder.find(Exec, lambda e: "end" in e.argv)
    assert recorder.count(File) == 0
