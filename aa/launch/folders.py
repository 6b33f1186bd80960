"""Looks at folders, and makes state folders, with the rights of a run's user and nobody else's.

aa-launch is root; what a path means to a user is found out by a child that has become that user.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from aa.launch import outside
from aa.launch.confine import Kind, Seen, View, Wanted
from aa.launch.sandbox import Directory, state_folder
from aa.policy.compile import absolute
from aa.policy.pattern import glob

LOOK_SECONDS = 5.0
"""For the child; a home on a server that is away must not hold up the launch of others."""
MAX_REPLY = 1 << 20
MAX_NAMES = 1024
"""Names in folders that fit the globs of the policy; with more no run starts."""
MAX_LISTED = 100_000
"""Names of one folder that are compared with a glob."""
MAX_LINKS = 40
"""Links of the system on the way to one path, as the kernel has it."""

FOLDER_MODE = 0o700


class CannotLook(Exception):
    """The child did not answer."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a run's user sees."""

    home: str
    """The home without links in its path."""
    directory: Directory | None
    """The working directory by its path; None when the user cannot reach it."""
    reason: str
    """Why not."""
    folders: tuple[Directory, ...]
    covered: tuple[str, ...]
    """Sockets and terminals of others that the user could open."""
    notes: tuple[str, ...]
    """What is not as a person would expect."""
    seen: View = field(default_factory=dict)
    """The paths that the policy is about."""


async def look(
    user: pwd.struct_passwd,
    directory: str,
    declared: Sequence[str],
    *,
    terminal: int = 0,
    wanted: Sequence[Wanted] = (),
) -> Found:
    """Resolves the working directory, makes what is missing of the declared state folders, finds
    what others offer, and looks at the paths that the policy is about. `terminal` is the device
    number of the run's own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        _child(user, theirs, lambda: _look(user.pw_dir, directory, declared, terminal, wanted))
    theirs.close()
    try:
        ours.setblocking(False)
        async with asyncio.timeout(LOOK_SECONDS):
            told = json.loads(await _read_all(ours))
    except (TimeoutError, ValueError) as e:
        os.kill(pid, signal.SIGKILL)
        raise CannotLook(f"cannot look at {directory} as {user.pw_name}: {e or 'no answer'}") from e
    finally:
        ours.close()
        await asyncio.shield(_reap(pid))
    if told["problem"]:
        raise CannotLook(told["problem"])
    return Found(
        home=told["home"],
        directory=Directory(*told["directory"]) if told["directory"] else None,
        reason=told["reason"],
        folders=tuple(Directory(*f) for f in told["folders"]),
        covered=tuple(told["covered"]),
        notes=tuple(told["notes"]),
        seen={w: tuple(map(_seen, found)) for w, found in zip(wanted, told["seen"], strict=True)},
    )


def _seen(told: list[Any]) -> Seen:
    path, kind, device, inode, above = told
    return Seen(path, Kind(kind), device, inode, tuple(Directory(*a) for a in above))


async def _read_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while part := await loop.sock_recv(sock, 65536):
        data += part
        if len(data) > MAX_REPLY:
            raise ValueError("the answer is too long")
    return data


async def _reap(pid: int) -> None:
    """Waits for the child, which is at its end. One that hangs in the kernel is left to systemd."""
    for _ in range(100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        await asyncio.sleep(0.001)


def _child(
    user: pwd.struct_passwd, reply: socket.socket, look: Callable[[], dict[str, Any]]
) -> NoReturn:
    """Becomes the user, looks, answers and ends. Nothing of the parent may run on in here."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
        os.umask(0o077)
        reply.sendall(json.dumps(look()).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _look(
    home: str,
    directory: str,
    declared: Sequence[str],
    terminal: int,
    wanted: Sequence[Wanted],
) -> dict[str, Any]:
    real_home = os.path.realpath(home)
    folders: list[tuple[str, int, int]] = []
    notes: list[str] = []
    for name in declared:
        place = state_folder(name, real_home)
        if place is None:
            notes.append(f"state folder {name} is left out: {real_home} is no home")
            continue
        try:
            folders.append(make_folder(*place))
        except OSError as e:
            notes.append(f"state folder {name} stays read-only: {e.strerror}")
    found: tuple[str, int, int] | None = None
    reason = ""
    try:
        os.chdir(directory)
        status = os.stat(directory, follow_symlinks=False)
        found = (directory, status.st_dev, status.st_ino)
    except OSError as e:
        reason = e.strerror or str(e)
    try:
        sockets, complete = outside.read_socket_paths(real_home, directory)
        if not complete:
            notes.append(
                "not all folders were looked through for sockets of other programs; "
                "those that are not where they were bound may stay within reach"
            )
    except OSError as e:
        sockets = []
        notes.append(f"sockets of other programs stay within reach: {e}")
    covered, more = outside.reachable(sockets, terminal)
    if more:
        notes.append(f"{more} sockets or terminals of other programs stay within reach")
    return {
        "home": real_home,
        "directory": found,
        "reason": reason,
        "folders": folders,
        "covered": covered,
        "notes": notes,
        **_looked_at(wanted, real_home, directory),
    }


# -- the paths that the policy is about


class TooManyNames(Exception):
    """More names fit the globs of the policy than can be mounted over."""


def _looked_at(wanted: Sequence[Wanted], home: str, directory: str) -> dict[str, Any]:
    told: list[list[Any]] = []
    count = 0
    for w in wanted:
        path = absolute(w.path, home=home, directory=directory)
        try:
            found = [see(path)] if not w.names else see_names(path, w.names)
        except (TooManyNames, OSError) as e:
            return {"seen": [], "problem": f"cannot look at {path}: {e}"}
        count += len(found)
        told.append([[s.path, s.kind.value, s.device, s.inode, _numbers(s.above)] for s in found])
    if count > MAX_NAMES + len(wanted):
        return {"seen": [], "problem": f"more than {MAX_NAMES} names fit the policy's patterns"}
    return {"seen": told, "problem": ""}


def _numbers(above: Sequence[Directory]) -> list[tuple[str, int, int]]:
    return [(a.path, a.device, a.inode) for a in above]


def see_names(folder: str, names: str) -> list[Seen]:
    """What in a folder fits a glob; nothing where its user cannot list it."""
    fits = glob(names)
    top = see(folder)
    if top.kind is not Kind.FOLDER:
        return []
    found = []
    try:
        with os.scandir(top.path) as entries:
            for number, entry in enumerate(entries):
                if number >= MAX_LISTED:
                    raise TooManyNames(f"it has more than {MAX_LISTED} names")
                if fits(entry.name):
                    found.append(see(os.path.join(top.path, entry.name)))
    except PermissionError:
        return []
    return found


def see(path: str) -> Seen:
    """Walks to an absolute path. Links of the system, which its user cannot have made, are
    followed; at any other the walk ends."""
    parts = [part for part in path.split("/") if part]
    at, above, links = "/", [_place("/")], 0
    while parts:
        name = parts.pop(0)
        here = os.path.join(at, name)
        try:
            status = os.lstat(here)
        except (FileNotFoundError, NotADirectoryError):
            return Seen(os.path.join(here, *parts), Kind.MISSING, above=tuple(above))
        except OSError:
            return Seen(os.path.join(here, *parts), Kind.UNREACHABLE, above=tuple(above))
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > MAX_LINKS or not _is_systems(status, at):
                return Seen(os.path.join(here, *parts), Kind.LINK, above=tuple(above))
            # From the top again, so that `..` in it means what it says.
            target = os.path.normpath(os.path.join(at, os.readlink(here)))
            parts = [part for part in target.split("/") if part] + parts
            at, above = "/", [_place("/")]
            continue
        if not parts or not stat.S_ISDIR(status.st_mode):
            kind = Kind.FOLDER if stat.S_ISDIR(status.st_mode) else Kind.FILE
            if parts:  # something is to be below a file
                kind, here = Kind.MISSING, os.path.join(here, *parts)
            return Seen(here, kind, status.st_dev, status.st_ino, tuple(above))
        at = here
        above.append(Directory(here, status.st_dev, status.st_ino))
    return Seen(at, Kind.FOLDER, above[-1].device, above[-1].inode, tuple(above[:-1]))


def _place(path: str) -> Directory:
    status = os.stat(path)
    return Directory(path, status.st_dev, status.st_ino)


def _is_systems(link: os.stat_result, folder: str) -> bool:
    """Whether only root can have put a link where it is."""
    return link.st_uid == 0 and os.stat(folder).st_uid == 0 and not os.access(folder, os.W_OK)


def make_folder(top: str, path: str) -> tuple[str, int, int]:
    """Opens a folder below `top`, making what is missing of it. A link on the way is an error."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(top, flags)
    try:
        for part in os.path.relpath(path, top).split("/"):
            try:
                below = os.open(part, flags, dir_fd=fd)
            except FileNotFoundError:
                os.mkdir(part, FOLDER_MODE, dir_fd=fd)
                below = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = below
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(20, "not a folder")
        return path, status.st_dev, status.st_ino
    finally:
        os.close(fd)
