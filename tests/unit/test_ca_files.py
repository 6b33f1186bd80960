"""Key files: never open to others, and refused when they are."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aa.ca import files
from aa.ca.errors import CertificateAuthorityError, UnsafeFile


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [files.SECRET, files.GROUP_SECRET, files.PUBLIC])
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_written_file_has_its_mode_whatever_the_umask(
    directory: Path, mode: int, umask: int
) -> None:
    before = os.umask(umask)
    try:
        files.write(directory / "f", b"content", mode=mode)
    finally:
        os.umask(before)
    assert mode_of(directory / "f") == mode
    assert (directory / "f").read_bytes() == b"content"
    assert [p.name for p in directory.iterdir()] == ["f"]


def test_a_key_is_never_readable_by_others_on_its_way(directory: Path) -> None:
    """Follows every system call of a writer: the file is closed to others before its first byte."""
    code = (
        "import os, pathlib; os.umask(0); from aa.ca import files; "
        f"files.write(pathlib.Path({str(directory)!r}) / 'k', b'SECRET', mode=0o440)"
    )
    trace = directory / "trace"
    subprocess.run(
        ["strace", "-f", "-o", trace, "-e", "trace=open,openat,creat,write,chmod,fchmod,fchown,rename",
         sys.executable, "-c", code],
        check=True, timeout=30, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    lines = [
        line for line in trace.read_text().splitlines() if ".k.new" in line or "SECRET" in line
    ]
    made = next(line for line in lines if "O_CREAT" in line)
    assert "O_EXCL" in made and "O_NOFOLLOW" in made
    assert re.search(r", 0400\)", made), made
    text = trace.read_text()
    assert (
        text.index("fchown(")
        < text.index("fchmod(")
        < text.index('"SECRET"')
        < text.index("rename(")
    )


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(directory / "f", b"old", mode=files.SECRET)

    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        files.write(directory / "f", b"new", mode=files.SECRET)
    monkeypatch.undo()
    assert (directory / "f").read_bytes() == b"old"
    assert [p.name for p in directory.iterdir()] == ["f"]


def test_a_link_in_the_place_of_the_new_file_is_not_followed(directory: Path) -> None:
    victim = directory / "victim"
    victim.write_text("untouched")
    (directory / ".f.new").symlink_to(victim)
    files.write(directory / "f", b"new", mode=files.SECRET)
    assert victim.read_text() == "untouched"
    assert not (directory / "f").is_symlink()


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_reads_a_key_that_only_its_owner_can_read(directory: Path, mode: int) -> None:
    (directory / "k").write_bytes(b"key")
    (directory / "k").chmod(mode)
    assert files.read_secret(directory / "k") == b"key"


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o420, 0o402, 0o644, 0o777, 0o4400, 0o500])
def test_refuses_a_key_that_others_can_get_at(directory: Path, mode: int) -> None:
    (directory / "k").write_bytes(b"key")
    (directory / "k").chmod(mode)
    with pytest.raises(UnsafeFile) as caught:
        files.read_secret(directory / "k")
    assert str(directory / "k") in str(caught.value)
    assert "chmod 0400" in caught.value.fix and "aasm ca rotate" in caught.value.fix


def test_a_group_may_read_only_where_that_is_meant(directory: Path) -> None:
    (directory / "k").write_bytes(b"key")
    (directory / "k").chmod(0o440)
    assert files.read_secret(directory / "k", group_reads=True) == b"key"
    for mode in (0o460, 0o444, 0o441):
        (directory / "k").chmod(mode)
        with pytest.raises(UnsafeFile, match="mode"):
            files.read_secret(directory / "k", group_reads=True)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_refuses_a_key_in_a_directory_that_others_can_write_to(directory: Path, mode: int) -> None:
    (directory / "k").write_bytes(b"key")
    (directory / "k").chmod(0o400)
    directory.chmod(mode)
    with pytest.raises(UnsafeFile, match="chmod go-w"):
        files.read_secret(directory / "k")


def test_refuses_links_fifos_second_names_and_what_is_too_large(directory: Path) -> None:
    key = directory / "k"
    key.write_bytes(b"key")
    key.chmod(0o400)
    (directory / "link").symlink_to(key)
    with pytest.raises(UnsafeFile, match="symbolic link"):
        files.read_secret(directory / "link")
    os.mkfifo(directory / "fifo", 0o400)
    with pytest.raises(UnsafeFile, match="regular"):
        files.read_secret(directory / "fifo")
    os.link(key, directory / "second")
    with pytest.raises(UnsafeFile, match="2 names"):
        files.read_secret(key)
    (directory / "second").unlink()
    key.chmod(0o600)
    key.write_bytes(b"x" * (files.MAX_FILE + 1))
    with pytest.raises(UnsafeFile, match="larger"):
        files.read_secret(key)


def test_a_public_file_is_refused_only_when_others_can_write_it(directory: Path) -> None:
    (directory / "c").write_bytes(b"certificate")
    (directory / "c").chmod(0o644)
    assert files.read_public(directory / "c") == b"certificate"
    (directory / "c").chmod(0o664)
    with pytest.raises(UnsafeFile, match="written by others"):
        files.read_public(directory / "c")


def test_a_made_directory_has_its_mode_and_an_existing_one_is_checked(directory: Path) -> None:
    files.make_directory(directory / "d", mode=0o750)
    assert mode_of(directory / "d") == 0o750
    files.make_directory(directory / "d", mode=0o700)
    assert mode_of(directory / "d") == 0o750
    (directory / "d").chmod(0o777)
    with pytest.raises(UnsafeFile):
        files.make_directory(directory / "d", mode=0o750)
    (directory / "file").touch()
    with pytest.raises(UnsafeFile, match="no directory"):
        files.make_directory(directory / "file", mode=0o750)


def test_writers_take_turns(directory: Path) -> None:
    order = []
    inside = threading.Event()

    def second() -> None:
        inside.wait(5)
        with files.locked(directory):
            order.append("second")

    other = threading.Thread(target=second)
    other.start()
    with files.locked(directory):
        inside.set()
        other.join(0.2)
        order.append("first")
    other.join(5)
    assert order == ["first", "second"]


def test_a_writer_does_not_wait_for_ever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with (
        files.locked(directory),
        pytest.raises(CertificateAuthorityError, match="fuser"),
        files.locked(directory),
    ):
        raise AssertionError("two writers at once")
