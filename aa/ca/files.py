"""Files that hold keys: nobody else can read them at any moment, and one that others could is refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from aa.ca.errors import CertificateAuthorityError, UnsafeFile

MAX_FILE = 256 * 1024
"""Bytes of a key or certificate file; a larger one is not one of ours."""
LOCK_SECONDS = 30.0
"""How long one writer waits for another."""
PUBLIC, GROUP_SECRET, SECRET = 0o444, 0o440, 0o400
"""Modes of what this package writes."""


def read_secret(path: Path, *, group_reads: bool = False) -> bytes:
    """The file's content, if only its owner (and, with `group_reads`, its group) can read it.

    Raises `UnsafeFile` when others might have read or replaced it, `OSError` when it cannot be read.
    """
    check_directory(path.parent)
    mode = GROUP_SECRET if group_reads else SECRET
    forbidden = 0o7777 & ~(mode | stat.S_IRUSR | stat.S_IWUSR)
    with _opened(path) as fd:
        told = os.fstat(fd)
        _check_owner(path, told)
        if told.st_nlink != 1:
            raise UnsafeFile(
                f"{path} has {told.st_nlink} names",
                fix=f"find the other: find / -inum {told.st_ino}",
            )
        if told.st_mode & forbidden:
            raise UnsafeFile(
                f"{path} has mode {stat.S_IMODE(told.st_mode):04o}, so others could have got at the key",
                fix=f"`sudo aasm ca rotate`, or, if nobody did, `sudo chmod {mode:04o} {path}`",
            )
        return _read(fd, path)


def read_public(path: Path) -> bytes:
    """The content of a certificate file that others may read but not write."""
    check_directory(path.parent)
    with _opened(path) as fd:
        told = os.fstat(fd)
        _check_owner(path, told)
        if told.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnsafeFile(
                f"{path} can be written by others", fix=f"sudo chmod {PUBLIC:04o} {path}"
            )
        return _read(fd, path)


def check_directory(path: Path) -> None:
    """Raises `UnsafeFile` when somebody else could put files there."""
    told = os.stat(path)
    if not stat.S_ISDIR(told.st_mode):
        raise UnsafeFile(f"{path} is no directory", fix=f"move it away: sudo mv {path} {path}.old")
    _check_owner(path, told)
    if told.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeFile(f"{path} can be written by others", fix=f"sudo chmod go-w {path}")


def write(path: Path, data: bytes, *, mode: int, gid: int = -1) -> None:
    """Replaces a file in one step. Owner, group and mode are right before the first byte is in it."""
    check_directory(path.parent)
    fresh = path.parent / f".{path.name}.new"
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()  # of a writer that died; the lock says that there is no other now
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET)
    try:
        try:
            os.fchown(fd, -1, gid)
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(fresh, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        raise
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)
    sync(target.parent)


def sync(directory: Path) -> None:
    """Makes what was renamed in a directory survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path, *, mode: int, gid: int = -1) -> None:
    """Makes a directory that is closed until its group and mode are right. An existing one is checked."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        check_directory(path)
        return
    os.chown(path, -1, gid)
    os.chmod(path, mode)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One writer at a time. Raises `CertificateAuthorityError` when another one takes too long."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CertificateAuthorityError(
                        f"another process holds {directory} for more than {LOCK_SECONDS:.0f} s",
                        fix=f"see who: sudo fuser -v {directory}",
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        if path.is_symlink():
            raise UnsafeFile(f"{path} is a symbolic link", fix=f"sudo rm {path}") from e
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsafeFile(f"{path} is no regular file", fix=f"sudo rm {path}")
        yield fd
    finally:
        os.close(fd)


def _check_owner(path: Path, told: os.stat_result) -> None:
    if told.st_uid not in (0, os.geteuid()):
        raise UnsafeFile(
            f"{path} belongs to uid {told.st_uid}, not to root", fix=f"sudo chown root {path}"
        )


def _read(fd: int, path: Path) -> bytes:
    data = b""
    while chunk := os.read(fd, MAX_FILE + 1 - len(data)):
        data += chunk
    if len(data) > MAX_FILE:
        raise UnsafeFile(f"{path} is larger than {MAX_FILE} bytes", fix="it is not a key of ours")
    return data
