"""What a policy's share becomes on a host: mounts, proofs, notes, and reasons not to start."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from aa.launch import confine, folders
from aa.launch.confine import Kind, Seen, Unenforceable, View, Wanted, confined, wanted
from aa.launch.folders import see, see_names
from aa.launch.sandbox import Check, Directory, Place, Proof, Sandbox
from aa.model import Run
from aa.policy import loads
from aa.policy.compile import Share, absolute

HOME = "/home/dev"
WORK = "/home/dev/work"
PYTHON = "/usr/bin/python3.11"
RUN = Run("", "agent", "dev", 1000)
CHANGE = 'access = ["write", "delete"]'


def share(*rules: str, sandbox: str = "", default: str = "") -> Share:
    """Of rules such as `deny file ["/x"]`; what stands behind the list belongs to the matcher."""
    text = '[policy]\nid = "p"\n' + (f"default = {{ {default} }}\n" if default else "")
    for n, rule in enumerate(rules):
        effect, section, rest = rule.split(" ", 2)
        text += f'[[rule]]\nid = "r{n}"\neffect = "{effect}"\n{section} = {{ paths = {rest} }}\n'
    text += f"[sandbox]\n{sandbox}\n" if sandbox else ""
    return loads({"p.toml": text}).compile(RUN).share


def above(path: str) -> tuple[Directory, ...]:
    return tuple(Directory(str(p), 1, hash(str(p)) % 1000) for p in reversed(Path(path).parents))


def looked(of: Share, there: Iterable[str] = (), **kinds: Kind) -> View:
    """What a user would see where these paths exist: those that end in / are folders."""
    files = {p.rstrip("/"): Kind.FOLDER if p.endswith("/") else Kind.FILE for p in there}
    seen = {}
    for w in wanted(of):
        path = absolute(w.path, home=HOME, directory=WORK)
        names = [f"{path}/{name}" for name in ("id_a", "id_b")] if w.names else [path]
        seen[w] = tuple(
            Seen(p, kinds.get("every", files.get(p, Kind.MISSING)), 1, 2, above(p)) for p in names
        )
    return seen


def box(place: Place = Place.WRITABLE, *state: str, directory: str = WORK) -> Sandbox:
    return Sandbox(Directory(directory, 1, 1), place, tuple(Directory(s, 1, 9) for s in state))


def made(of: Share, there: Iterable[str] = (), what: Sandbox | None = None, **kinds: Any) -> Any:
    """The sandbox and its notes."""
    view = looked(of, there, **kinds)
    return confined(what or box(), of, view, home=HOME, interpreter=PYTHON)


def refused(of: Share, there: Iterable[str] = (), what: Sandbox | None = None) -> str:
    with pytest.raises(Unenforceable) as raised:
        made(of, there, what)
    return str(raised.value)


# -- what is closed


def test_reading_writing_and_executing_are_closed_each_in_its_way_and_proved() -> None:
    of = share(
        'deny file ["~/.ssh/**", "/etc/shadow"]',
        f'deny file ["{WORK}/Makefile"], {CHANGE}',
        'deny exec ["/usr/bin/sudo"]',
    )
    there = [f"{HOME}/.ssh/", "/etc/shadow", f"{WORK}/Makefile", "/usr/bin/sudo"]
    found, notes = made(of, there)
    assert found.mounts.inaccessible == ("/etc/shadow", f"{HOME}/.ssh")
    assert found.mounts.read_only == (f"{WORK}/Makefile",)
    assert found.mounts.no_exec == ("/usr/bin/sudo",)
    assert found.checks == (
        Check("/etc/shadow", Proof.CLOSED),
        Check(f"{HOME}/.ssh", Proof.CLOSED),
        Check(f"{WORK}/Makefile", Proof.READ_ONLY),
        Check("/usr/bin/sudo", Proof.NO_EXEC),
    )
    assert notes == []


def test_what_several_rules_say_of_a_path_adds_up() -> None:
    of = share('deny exec ["/opt/x/**"]', f'deny file ["/opt/x/**"], {CHANGE}')
    found, _ = made(of, ["/opt/x/"])
    assert (found.mounts.read_only, found.mounts.no_exec) == (("/opt/x",), ("/opt/x",))


def test_a_mount_without_execution_is_as_writable_as_what_is_around_it() -> None:
    rules = 'deny exec ["/opt/x/**", "~/work/bin/**", "/usr/bin/su", "~/bin/**"]'
    there = ["/opt/x/", f"{WORK}/bin/", "/usr/bin/su", f"{HOME}/bin/"]
    found, _ = made(share(rules), there)
    assert set(found.mounts.fixed) == {"/opt/x", "/usr/bin/su", f"{HOME}/bin"}
    assert {f.path for f in found.fixed} == set(found.mounts.fixed)
    free, _ = made(share(rules, default='file = "allow"'), there)
    assert free.mounts.fixed == ("/usr/bin/su",)


def test_every_name_that_fits_a_glob_is_closed() -> None:
    found, _ = made(share('deny file ["~/.ssh/id_*"]'), [f"{HOME}/.ssh/id_a", f"{HOME}/.ssh/id_b"])
    assert found.mounts.inaccessible == (f"{HOME}/.ssh/id_a", f"{HOME}/.ssh/id_b")


def test_folders_around_what_is_protected_in_a_writable_one_cannot_be_moved_away() -> None:
    of = share(sandbox='read_only = [".git/hooks", "a/b/c"]')
    found, _ = made(of, [f"{WORK}/.git/hooks/", f"{WORK}/a/b/c"])
    assert [k.path for k in found.kept] == [f"{WORK}/.git", f"{WORK}/a", f"{WORK}/a/b"]
    assert found.mounts.read_only == (f"{WORK}/.git/hooks", f"{WORK}/a/b/c")
    outside, _ = made(share(f'deny file ["~/.config/x/**"], {CHANGE}'), [f"{HOME}/.config/x/"])
    assert outside.kept == ()


def test_a_file_that_must_only_not_be_removed_can_still_be_written_to() -> None:
    of = share(f'deny file ["{WORK}/log"], access = ["delete"]')
    found, _ = made(of, [f"{WORK}/log"])
    assert [k.path for k in found.kept] == [f"{WORK}/log"]
    assert found.mounts.read_only == found.mounts.inaccessible == ()


def test_a_missing_path_that_the_run_may_make_is_told_and_one_elsewhere_is_not() -> None:
    of = share('deny file ["~/.ssh/**"]', sandbox='read_only = [".envrc", ".vscode"]')
    found, notes = made(of)
    assert notes == [
        f"{WORK}/.envrc, {WORK}/.vscode does not exist, so the run may make it, whatever "
        "[sandbox] read_only says"
    ]
    assert found.mounts.read_only == (f"{WORK}/.envrc", f"{WORK}/.vscode")
    assert found.checks == ()


def test_a_link_that_the_user_could_have_made_is_told() -> None:
    _, notes = made(share(sandbox='read_only = [".envrc"]'), every=Kind.LINK)
    assert "is a link" in notes[0]


def test_nothing_of_the_host_is_in_the_runs_own_folders() -> None:
    found, notes = made(share('deny file ["/tmp/x/**"]'))
    assert (found.mounts.inaccessible, notes) == ((), [])
    inside = box(directory="/tmp/project")
    found, _ = made(share('deny file ["/tmp/project/key"]'), ["/tmp/project/key"], inside)
    assert found.mounts.inaccessible == ("/tmp/project/key",)


# -- a denial wins over what is writable


def test_a_writable_folder_in_what_must_not_be_written_is_not_writable() -> None:
    of = share(f'deny file ["~/.cache/**"], {CHANGE}')
    found, notes = made(of, [f"{HOME}/.cache/"], box(Place.WRITABLE, f"{HOME}/.cache/x", "/srv/y"))
    assert [f.path for f in found.folders] == ["/srv/y"]
    assert "p/r0 closes" in notes[0]


def test_the_working_directory_in_what_must_not_be_written_is_read_only() -> None:
    found, notes = made(share(f'deny file ["/home/**"], {CHANGE}'), ["/home/"])
    assert found.place is Place.READ_ONLY and "read-only" in notes[0]


def test_the_runs_own_folders_are_not_granted_where_a_rule_denies_writing_to_them() -> None:
    found, _ = made(share(f'deny file ["/tmp/**"], {CHANGE}'), ["/tmp/"])
    assert "/tmp" not in found.private and "/var/tmp" in found.private


# -- what cannot be


@pytest.mark.parametrize("path", ["/**", "/usr/**", "/usr/lib", "/proc/**", PYTHON])
def test_no_run_starts_without_what_every_program_needs(path: str) -> None:
    assert "p/r0" in refused(share(f'deny file ["{path}"]'), [path.removesuffix("**") or "/"])


def test_no_run_starts_in_a_closed_directory() -> None:
    assert "working directory" in refused(share('deny file ["~/work/**"]'), [f"{WORK}/"])


def test_the_shims_own_program_cannot_be_closed_and_that_is_told() -> None:
    found, notes = made(share(f'deny exec ["{PYTHON}", "/usr/bin/su"]'), [PYTHON, "/usr/bin/su"])
    assert found.mounts.no_exec == ("/usr/bin/su",)
    assert "in spite of p/r0" in notes[0]
    assert "shim" in refused(share('deny exec ["/usr/bin/**"]'), ["/usr/bin/"])


def test_user_namespaces_need_what_this_version_does_not_have() -> None:
    assert "rung lsm or fmod_ret" in refused(share(sandbox='user_namespaces = "allow"'))


def test_more_paths_than_can_be_mounted_over_are_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    of = share('deny file ["/a/1", "/a/2", "/a/3"]')
    made(of)
    monkeypatch.setattr(confine, "MAX_MOUNTS", 2)
    assert "3 paths" in refused(of)


# -- defaults that deny


def test_with_exec_denied_every_mount_is_without_execution_but_for_what_is_allowed() -> None:
    of = share(
        'allow exec ["/usr/bin/git", "/opt/tools/**", "~/work/bin/**", "/opt/file", "/opt/gone"]',
        'deny exec ["/opt/tools/bad"]',
        default='exec = "deny"',
    )
    there = ["/usr/bin/git", "/opt/tools/", f"{WORK}/bin/", "/opt/file/", "/opt/tools/bad"]
    found, _ = made(of, there)
    assert {"/", "/tmp", WORK, "/opt/tools/bad"} <= set(found.mounts.no_exec)
    assert {PYTHON, "/usr/lib", "/usr/bin/git", "/opt/tools"} <= set(found.mounts.fixed)
    assert found.mounts.exec == (f"{WORK}/bin",)
    # A folder that a rule names like a file is not granted with all that is in it.
    assert [e.path for e in found.executable] == [f"{WORK}/bin", "/opt/tools", "/usr/bin/git"]


def test_a_program_that_one_rule_allows_and_another_denies_is_not_granted() -> None:
    of = share('allow exec ["/usr/bin/git"]', 'deny exec ["/usr/bin/git"]', default='exec = "deny"')
    found, _ = made(of, ["/usr/bin/git"])
    assert found.executable == found.mounts.exec == ()
    assert "/usr/bin/git" in found.mounts.no_exec


def test_a_writable_folder_whose_programs_are_allowed_is_executable() -> None:
    of = share('allow exec ["~/work/**"]', default='exec = "deny"')
    found, _ = made(of, [f"{WORK}/"])
    assert WORK not in found.mounts.no_exec and WORK in found.mounts.exec


def test_with_files_denied_only_what_is_there_and_no_link_is_granted() -> None:
    of = share(
        'allow file ["~/.gitconfig", "~/.config/x/**"], access = ["read"]', default='file = "deny"'
    )
    found, _ = made(of, [f"{HOME}/.gitconfig", f"{HOME}/.config/x/"])
    assert [r.path for r in found.readable] == [f"{HOME}/.config/x", f"{HOME}/.gitconfig"]
    linked, _ = made(of, every=Kind.LINK)
    assert linked.readable == ()


# -- looking


def test_a_path_is_walked_to_and_the_folders_on_the_way_are_told(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    found = see(str(tmp_path / "a/b/file"))
    status = (tmp_path / "a/b/file").stat()
    assert (found.kind, found.inode) == (Kind.FILE, status.st_ino)
    assert [f.path for f in found.above][-2:] == [str(tmp_path / "a"), str(tmp_path / "a/b")]
    assert see(str(tmp_path / "a")).kind is Kind.FOLDER
    for missing in ("a/c", "a/c/d", "a/b/file/x"):
        found = see(str(tmp_path / missing))
        assert (found.kind, found.path) == (Kind.MISSING, str(tmp_path / missing))
    assert see("/").kind is Kind.FOLDER


def test_links_of_the_system_are_followed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "up").symlink_to("real/../real")
    (tmp_path / "round").symlink_to("round")
    assert see(str(tmp_path / "link/file")).kind is Kind.LINK
    monkeypatch.setattr(folders, "_is_systems", lambda link, folder: True)
    for name in ("link", "up"):
        found = see(str(tmp_path / name / "file"))
        assert (found.kind, found.path) == (Kind.FILE, str(tmp_path / "real/file"))
    assert see(str(tmp_path / "round")).kind is Kind.LINK


def test_a_link_is_the_systems_where_only_root_can_make_one() -> None:
    mine = os.stat_result([stat.S_IFLNK | 0o777, 1, 1, 1, 1000, 0, 0, 0, 0, 0])
    assert not folders._is_systems(mine, "/")
    if os.geteuid() != 0:  # root itself may write everywhere
        assert folders._is_systems(os.lstat("/proc/self"), "/usr")


def test_names_in_a_folder_are_compared_as_a_whole(tmp_path: Path) -> None:
    for name in ("id_rsa", "id_rsa.pub", "known_hosts"):
        (tmp_path / name).touch()
    assert sorted(Path(s.path).name for s in see_names(str(tmp_path), "id_*")) == [
        "id_rsa", "id_rsa.pub",
    ]  # fmt: skip
    assert see_names(str(tmp_path / "none"), "*") == []


def test_every_path_is_looked_at_once() -> None:
    of = share(
        'deny file ["~/.ssh/**"]',
        f'deny file ["~/.ssh/**", "~/.ssh/id_*"], {CHANGE}',
        'allow exec ["/opt/x/**"]',
        sandbox='read_only = [".git/hooks"]',
        default='exec = "deny"',
    )
    assert wanted(of) == (
        Wanted("~/.ssh"),
        Wanted("~/.ssh", "id_*"),
        Wanted(".git/hooks"),
        Wanted("/opt/x"),
    )
