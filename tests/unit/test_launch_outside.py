"""Sockets and terminals of programs outside of a run are found, if its user could open them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from aa.launch import outside

HOME = "/home/dev"
TABLE = """Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 21 /run/dbus/system_bus_socket
0000000000000000: 00000002 00000000 00010000 0001 01 22 /srv/app/app.sock
0000000000000000: 00000002 00000000 00010000 0001 01 23 /home/dev/.ssh/control with space
0000000000000000: 00000002 00000000 00010000 0001 01 24 /tmp/tmux-2000/default
0000000000000000: 00000002 00000000 00010000 0001 01 25 @/tmp/.X11-unix/X0
0000000000000000: 00000003 00000000 00000000 0001 03 26
0000000000000000: 00000002 00000000 00010000 0001 01 27 /srv/../run/evil
0000000000000000: 00000002 00000000 00010000 0001 01 28 relative/path
0000000000000000: 00000002 00000000 00010000 0001 01 29 /srv/app/app.sock
0000000000000000: 00000002 00000000 00010000 0001 01 30 /srv/b\x07ell
"""


def test_paths_that_a_run_would_see_are_taken_once_and_those_in_the_home_first() -> None:
    found = outside.socket_paths(TABLE, HOME)
    assert found == ["/home/dev/.ssh/control with space", "/srv/app/app.sock"]


def test_an_empty_table_has_none() -> None:
    assert outside.socket_paths("", HOME) == outside.socket_paths(TABLE.splitlines()[0], HOME) == []


def bound(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name)
    return listener


def test_a_socket_is_found_where_it_was_linked_or_moved_to_after_it_was_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "PRIVATE", ())
    deep = tmp_path / "home" / ".config" / "editor"
    ssh = tmp_path / "home" / ".ssh"
    for folder in (deep, ssh, tmp_path / "work"):
        folder.mkdir(parents=True)
    with (
        bound(str(ssh / "control.Random")),
        bound(str(tmp_path / "work" / "plain")),
        bound(str(tmp_path / "work" / "before")),
    ):
        os.link(ssh / "control.Random", ssh / "control")  # as ssh does
        (ssh / "control.Random").unlink()
        (tmp_path / "work" / "before").rename(deep / "after")
        found, complete = outside.read_socket_paths(str(tmp_path / "home"), str(tmp_path / "work"))
    ours = {path for path in found if path.startswith(str(tmp_path))}
    assert complete
    assert {str(ssh / "control"), str(deep / "after"), str(tmp_path / "work/plain")} <= ours


def test_a_socket_with_a_relative_name_is_found_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "PRIVATE", ())
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "file").touch()
    monkeypatch.chdir(tmp_path / "ssh")
    with bound("control"):
        monkeypatch.chdir("/")
        found, _ = outside.read_socket_paths(str(tmp_path), str(tmp_path))
    assert str(tmp_path / "ssh" / "control") in found
    assert str(tmp_path / "ssh" / "file") not in found


def test_a_search_that_is_cut_short_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    assert outside.search((), (str(tmp_path),)) == (set(), True)
    monkeypatch.setattr(outside, "MAX_FOLDERS", 2)
    assert outside.search((), (str(tmp_path),)) == (set(), False)


def test_only_sockets_that_are_there_and_may_be_opened_are_reachable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        paths = [str(tmp_path / name) for name in ("s", "file", "missing")]
        found, more = outside.reachable(paths, 0)
    assert (paths[0] in found, paths[1] in found, paths[2] in found) == (True, False, False)
    assert more == 0


def test_the_runs_own_terminal_is_not_among_those_of_others() -> None:
    first, second = os.openpty(), os.openpty()
    try:
        own, other = (os.ttyname(pair[1]) for pair in (first, second))
        found, _ = outside.reachable([], os.fstat(first[1]).st_rdev)
        assert other in found and own not in found
    finally:
        for fd in (*first, *second):
            os.close(fd)


def test_what_is_over_the_limit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "MAX_COVERED", 1)
    monkeypatch.setattr(outside, "TERMINALS", str(tmp_path / "none"))
    listeners = []
    for name in "abc":
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(tmp_path / name))
    found, more = outside.reachable([str(tmp_path / n) for n in "abc"], 0)
    assert (found, more) == ([str(tmp_path / "a")], 2)
    for listener in listeners:
        listener.close()
