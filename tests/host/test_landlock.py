"""Landlock as the shim applies it, on this kernel: what it grants, what it refuses, and that it holds."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aa.launch import shim
from aa.launch.landlock import LOADERS

WORKS = 0
OTHER = 99


@pytest.fixture
def place() -> Iterator[Path]:
    """Not below /tmp, so that no other rule covers it."""
    with tempfile.TemporaryDirectory(dir="/var/lib") as path:
        for name in ("work", "other", "work/sub"):
            (Path(path) / name).mkdir()
        (Path(path) / "other/file").write_text("kept\n")
        yield Path(path)


def confined(place: Path, act: Callable[[], object]) -> int:
    """0 when `act` works in a child that may write `place`/work alone, else its errno."""
    pid = os.fork()
    if pid == 0:
        code = OTHER
        try:
            shim.landlock([["/", "read"], ["/dev", "device"], [str(place / "work"), "write"]], True)
            act()
            code = WORKS
        except OSError as e:
            code = e.errno or OTHER
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_this_kernel_has_an_abi_that_is_enough() -> None:
    assert shim.landlock_abi() >= shim.MINIMUM_ABI


def test_writing_is_granted_below_the_folder_and_refused_beside_it(place: Path) -> None:
    work, other = place / "work", place / "other"
    for act in (
        lambda top: (top / "new").write_text("x"),
        lambda top: (top / "folder").mkdir(),
        lambda top: (top / "link").symlink_to("/"),
        lambda top: os.mkfifo(top / "fifo"),
    ):
        assert confined(place, lambda act=act: act(work)) == WORKS
        assert confined(place, lambda act=act: act(other)) == errno.EACCES
    assert confined(place, lambda: (other / "file").read_text()) == WORKS
    assert confined(place, lambda: (other / "file").unlink()) == errno.EACCES
    assert confined(place, lambda: os.truncate(other / "file", 0)) == errno.EACCES
    assert (other / "file").read_text() == "kept\n"


def rights(place: Path, rules: list[list[object]], act: Callable[[], object]) -> int:
    """0 when `act` works in a child under these rules, else its errno."""
    pid = os.fork()
    if pid == 0:
        code = OTHER
        try:
            shim.landlock(rules, True)
            act()
            code = WORKS
        except OSError as e:
            code = e.errno or OTHER
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def execute(path: str) -> None:
    """Like a program that ends well, when it may be executed."""
    os.execv(path, [path])


LOADED: list[list[object]] = [[path, "read", True] for path in LOADERS]


def test_with_look_alone_programs_are_read_and_not_executed(place: Path) -> None:
    look = [["/", "look"], *LOADED]
    assert rights(place, look, lambda: open("/usr/bin/true", "rb").read(4)) == WORKS
    assert rights(place, look, lambda: execute("/usr/bin/true")) == errno.EACCES
    assert (
        rights(place, [*look, ["/usr/bin/true", "read"]], lambda: execute("/usr/bin/true")) == WORKS
    )
    assert (
        rights(place, [*look, ["/usr/bin/true", "read"]], lambda: execute("/usr/bin/env"))
        == errno.EACCES
    )


def test_what_may_be_changed_is_not_executed(place: Path) -> None:
    program = place / "work/true"
    shutil.copy("/usr/bin/true", program)
    for access, outcome in (("change", errno.EACCES), ("write", WORKS)):
        rules = [["/", "look"], *LOADED, [str(place / "work"), access]]
        assert rights(place, rules, lambda: (place / "work/new").write_text("x")) == WORKS
        assert rights(place, rules, lambda: execute(str(program))) == outcome


def test_without_the_root_only_what_is_granted_is_read(place: Path) -> None:
    rules = [["/usr", "read"], [str(place / "other/file"), "look"]]
    assert rights(place, rules, lambda: (place / "other/file").read_text()) == WORKS
    for closed in (place / "work", place / "other", Path("/etc")):
        assert rights(place, rules, lambda closed=closed: os.listdir(closed)) == errno.EACCES


def test_files_move_between_writable_folders_and_not_out_of_them(place: Path) -> None:
    source = place / "work/file"
    source.write_text("x")
    assert confined(place, lambda: source.rename(place / "work/sub/file")) == WORKS
    moved = place / "work/sub/file"
    assert confined(place, lambda: moved.rename(place / "other/file2")) in (
        errno.EACCES,
        errno.EXDEV,
    )
    assert confined(place, lambda: os.link(place / "other/file", place / "work/l")) in (
        errno.EACCES,
        errno.EXDEV,
    )


def test_a_link_out_of_the_folder_opens_nothing(place: Path) -> None:
    (place / "work/out").symlink_to(place / "other")
    assert confined(place, lambda: (place / "work/out/new").write_text("x")) == errno.EACCES


def test_device_nodes_cannot_be_made_but_used(place: Path) -> None:
    node = place / "work/null"
    assert (
        confined(place, lambda: os.mknod(node, 0o600 | 0o020000, os.makedev(1, 3))) == errno.EACCES
    )
    assert confined(place, lambda: open("/dev/null", "w").write("x")) == WORKS


def test_mounting_is_over(place: Path) -> None:
    libc = shim.libc()

    def mount() -> None:
        shim.checked(libc.mount(b"none", str(place / "work").encode(), b"tmpfs", 0, None), "mount")

    assert confined(place, mount) == errno.EPERM


@pytest.mark.parametrize("what", ["signal", "abstract"])
def test_signals_and_abstract_sockets_end_at_the_run(place: Path, what: str) -> None:
    """Where the ABI has scopes; below it this is unmeasured, as the documents say."""
    expected = errno.EPERM if shim.landlock_abi() >= 6 else WORKS
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0aa-test-landlock-{os.getpid()}")
    listener.listen()

    def reach(address: object) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)

    with listener:
        if what == "signal":
            assert confined(place, lambda: os.kill(os.getppid(), 0)) == expected
            assert confined(place, lambda: os.kill(os.getpid(), 0)) == WORKS
        else:
            assert confined(place, lambda: reach(listener.getsockname())) == expected

    def own() -> None:
        with socket.socket(socket.AF_UNIX) as inner:
            inner.bind(f"\0aa-test-inner-{os.getpid()}")
            inner.listen()
            reach(inner.getsockname())

    assert confined(place, own) == WORKS


def test_what_the_confined_start_is_confined_too(place: Path) -> None:
    def start() -> None:
        pid = os.posix_spawn("/bin/touch", ["touch", str(place / "other/new")], os.environ)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise PermissionError(errno.EACCES, "refused")

    assert confined(place, start) == errno.EACCES
    assert not (place / "other/new").exists()


def test_the_rules_of_older_abis_apply_here_too(place: Path) -> None:
    for abi in range(shim.MINIMUM_ABI, shim.landlock_abi() + 1):
        pid = os.fork()
        if pid == 0:
            code = OTHER
            try:
                shim.checked(shim.libc().prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
                shim.restrict([["/", "read"], [str(place / "work"), "write"]], abi, {})
                (place / "work" / str(abi)).write_text("x")
                try:
                    (place / "other" / str(abi)).write_text("x")
                except PermissionError:
                    code = WORKS
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == WORKS, f"ABI {abi}"


def test_a_link_put_in_place_of_a_verified_folder_gets_no_rights(place: Path) -> None:
    """Another run of the same user may write the folder above and so swap the one in it."""
    work, moved = place / "work", place / "moved"
    status = work.stat()
    told = {"path": str(work), "device": status.st_dev, "inode": status.st_ino, "writable": True}

    def outcome(top: Path) -> int:
        pid = os.fork()
        if pid == 0:
            code = OTHER
            try:
                shim.checked(shim.libc().prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
                opened = {str(work): shim.verify_place(told, "folder")}
                work.rename(moved)
                work.symlink_to(place / "other")
                shim.landlock([["/", "read"], [str(work), "write"]], True, opened)
                (top / "new").write_text("x")
                code = WORKS
            except OSError as e:
                code = e.errno or OTHER
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        work.unlink()
        moved.rename(work)
        return code

    assert outcome(place / "other") == errno.EACCES
    assert outcome(moved) == WORKS


def test_a_link_is_no_folder_to_verify(place: Path) -> None:
    status = (place / "work").stat()
    (place / "link").symlink_to("work")
    for name, fits in (("work", True), ("link", False)):
        told = {
            "path": str(place / name),
            "device": status.st_dev,
            "inode": status.st_ino,
            "writable": True,
        }
        if fits:
            os.close(shim.verify_place(told, "folder"))
        else:
            with pytest.raises(shim.Failure):
                shim.verify_place(told, "folder")


def test_without_landlock_a_run_that_needs_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "landlock_abi", lambda: 1)
    with pytest.raises(shim.Failure, match="landlock: this kernel has ABI 1"):
        shim.landlock([["/", "read"]], True)
    shim.landlock([["/no/such/path", "read"]], False)  # allowed to be missing: nothing is applied


def test_a_rule_for_a_path_that_is_not_there_is_an_error_and_not_left_out(place: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            shim.landlock([["/", "read"], [str(place / "missing"), "write"]], True)
        except FileNotFoundError:
            os._exit(WORKS)
        finally:
            os._exit(OTHER)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == WORKS
