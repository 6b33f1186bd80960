"""The unit properties of a run, and what its folders may be."""

from __future__ import annotations

from typing import Any

import pytest

from aa.launch.landlock import LOADERS, Access, rules
from aa.launch.sandbox import (
    FORBIDDEN_SYSTEM_CALLS,
    Directory,
    Mounts,
    Place,
    Sandbox,
    is_home,
    judge_directory,
    properties,
    state_folder,
)
from aa.launch.systemd import SIGNATURES, marshalled
from aa.model import Layer, Run
from aa.policy.sandbox import NEEDED

HOME = "/home/dev"
RUN = Run("r1", "sample", "dev", 2000, HOME, frozenset({Layer.PROXY, Layer.KERNEL}))


def box(path: str = "/home/dev/work", place: Place = Place.WRITABLE, **more: Any) -> Sandbox:
    return Sandbox(Directory(path, 1, 2), place, **more)


def made(sandbox: Sandbox, run: Run = RUN) -> list[tuple[str, Any]]:
    return properties(run, sandbox, shim_socket="/run/agent-assembly/shim/r1", streams=[3, 4, 5])


def of(sandbox: Sandbox, name: str, run: Run = RUN) -> Any:
    (value,) = [v for n, v in made(sandbox, run) if n == name]
    return value


def test_every_property_has_a_signature_and_can_be_marshalled() -> None:
    unit = made(
        box(folders=(Directory("/home/dev/.cache/x", 1, 3),), resolver="/run/r/resolv.conf")
    )
    assert {name for name, _ in unit} <= set(SIGNATURES)
    assert marshalled(unit)


def test_the_slice_follows_from_the_proxy_layer() -> None:
    local = Run("r1", "sample", "dev", 2000, HOME, frozenset({Layer.KERNEL}))
    assert of(box(), "Slice") == "aa-agents-proxy.slice"
    assert of(box(), "Slice", local) == "aa-agents-local.slice"


def test_io_uring_is_taken_out_of_the_allowed_calls_after_they_were_allowed() -> None:
    filters = [value for name, value in made(box()) if name == "SystemCallFilter"]
    (allows, allowed), (still_allows, forbidden) = filters
    assert (allows, still_allows) == (True, False)
    assert "@system-service" in allowed and "landlock_restrict_self" in allowed
    assert forbidden == FORBIDDEN_SYSTEM_CALLS and "io_uring_setup" in forbidden


def test_the_shim_gets_two_capabilities_and_no_more() -> None:
    assert of(box(), "CapabilityBoundingSet") == of(box(), "AmbientCapabilities") == 0x140


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NoNewPrivileges", True),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "read-only"),
        ("ProtectProc", "invisible"),
        ("PrivateTmp", True),
        ("PrivateDevices", True),
        ("RestrictNamespaces", 0),
        ("RestrictAddressFamilies", (True, ["AF_UNIX", "AF_INET", "AF_INET6"])),
        ("SystemCallArchitectures", ["native"]),
    ],
)
def test_the_sandbox_has(name: str, value: Any) -> None:
    assert of(box(), name) == value


def test_what_the_guard_keeps_and_the_runtime_folder_are_hidden() -> None:
    hidden = [path for path, _ in of(box(), "TemporaryFileSystem")]
    assert "/run" in hidden and "/dev/shm" in hidden
    closed = {path.removeprefix("-") for path in of(box(), "InaccessiblePaths")}
    assert {
        "/etc/agent-assembly",
        "/var/lib/agent-assembly",
        "/var/log/agent-assembly",
        "/var/log/journal",
        "/sys/fs/bpf",
    } <= closed


def test_a_run_sees_its_own_gateway_and_shim_sockets_and_no_others() -> None:
    shown = [(source, target) for source, target, *_ in of(box(), "BindReadOnlyPaths")]
    assert shown == [
        ("/run/agent-assembly/runs/r1", "/run/agent-assembly/run"),
        ("/run/agent-assembly/shim/r1", "/run/agent-assembly/shim/r1"),
    ]


def test_the_resolvers_file_is_shown_when_it_is_in_a_hidden_place() -> None:
    path = "/run/systemd/resolve/stub-resolv.conf"
    shown = [source for source, *_ in of(box(resolver=path), "BindReadOnlyPaths")]
    assert path in shown


def test_a_writable_directory_is_the_only_one() -> None:
    assert of(box(), "ReadWritePaths") == ["/home/dev/work"]
    assert of(box(place=Place.READ_ONLY), "ReadWritePaths") == []
    kept = box(place=Place.READ_ONLY, folders=(Directory("/home/dev/.cache/x", 1, 3),))
    assert of(kept, "ReadWritePaths") == ["/home/dev/.cache/x"]


@pytest.mark.parametrize("path", ["/tmp/project", "/var/tmp/a/b", "/dev/shm/p"])
def test_a_directory_in_a_private_place_is_bound_in(path: str) -> None:
    assert of(box(path), "BindPaths") == [(path, path, False, 16384)]
    assert of(box(path), "ReadWritePaths") == []


def test_no_value_of_the_environment_or_command_line_is_in_the_unit() -> None:
    run = Run("r1", "sample", "dev", 2000, HOME, frozenset(), argv=("prog", "--token=hunter2"))
    assert "hunter2" not in repr(made(box(), run)) and "prog" not in repr(made(box(), run))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/home/dev/work", Place.WRITABLE),
        ("/srv/project", Place.WRITABLE),
        ("/opt/project", Place.WRITABLE),
        ("/mnt/disk", Place.WRITABLE),
        ("/tmp/project", Place.WRITABLE),
        ("/var/tmp/project", Place.WRITABLE),
        ("/tmp", Place.PRIVATE),
        ("/dev/shm", Place.PRIVATE),
        ("/home/dev", Place.READ_ONLY),
        ("/home", Place.READ_ONLY),
        ("/", Place.READ_ONLY),
        ("/etc", Place.READ_ONLY),
        ("/etc/cron.d", Place.READ_ONLY),
        ("/usr/local/bin", Place.READ_ONLY),
        ("/var/spool/x", Place.READ_ONLY),
        ("/root/x", Place.READ_ONLY),
        ("/proc/1", Place.READ_ONLY),
        ("/usr/lib/agent-assembly", Place.READ_ONLY),
        ("/run/user/2000", Place.REFUSED),
        ("/etc/agent-assembly", Place.REFUSED),
        ("/var/log/agent-assembly/x", Place.REFUSED),
        ("/var/lib/docker/volumes", Place.REFUSED),
    ],
)
def test_a_working_directory_is_judged_by_where_it_is(path: str, place: Place) -> None:
    found, note = judge_directory(path, HOME)
    assert found is place
    assert bool(note) is (place is not Place.WRITABLE)


def test_a_name_that_only_begins_alike_is_another_folder() -> None:
    assert judge_directory("/home/developer/x", HOME)[0] is Place.WRITABLE
    assert judge_directory("/etcetera", HOME)[0] is Place.WRITABLE
    assert judge_directory("/runs", HOME)[0] is Place.WRITABLE


def test_a_home_below_var_is_a_home_and_its_projects_are_writable() -> None:
    home = "/var/lib/jenkins"
    assert judge_directory(f"{home}/workspace", home)[0] is Place.WRITABLE
    assert judge_directory("/var/lib", home)[0] is Place.READ_ONLY
    assert judge_directory("/var/lib/other", home)[0] is Place.READ_ONLY


@pytest.mark.parametrize(
    "home", ["/", "/bin", "/usr/sbin", "/dev", "/nonexistent", "/etc/x", "/run/x"]
)
def test_what_system_accounts_call_home_opens_nothing(home: str) -> None:
    assert not is_home(home)
    for path in ("/etc", "/usr/sbin/x", "/bin", "/", "/var/lib/x"):
        assert judge_directory(path, home)[0] is Place.READ_ONLY, path
    assert state_folder("~/x", home) is None


def test_state_folders_are_below_the_home_or_where_the_configuration_says() -> None:
    assert state_folder("~/.cache/x", HOME) == (HOME, "/home/dev/.cache/x")
    assert state_folder("/srv/state", HOME) == ("/", "/srv/state")
    for wrong in ("~/", "~/../other", "~/a/../../b"):
        assert state_folder(wrong, HOME) is None


def granted(sandbox: Sandbox) -> dict[Access, set[str]]:
    found: dict[Access, set[str]] = {access: set() for access in Access}
    for rule in rules(sandbox):
        found[rule.access].add(rule.path)
    return found


OWN = {"/home/dev/work", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"}


def test_landlock_grants_writing_where_the_mounts_do() -> None:
    found = granted(box())
    assert found[Access.WRITE] == OWN
    assert found[Access.READ] == {"/"}
    assert found[Access.LOOK] == found[Access.CHANGE] == set()


def test_with_exec_denied_nothing_is_executed_but_what_rules_allow_and_the_loader() -> None:
    found = granted(box(exec="deny", executable=(Directory("/usr/bin/git", 1, 3),)))
    assert found[Access.READ] == {"/usr/bin/git", *LOADERS}
    assert (found[Access.LOOK], found[Access.CHANGE]) == ({"/"}, OWN)
    assert found[Access.WRITE] == set()


def test_with_files_denied_the_root_is_not_granted() -> None:
    found = granted(box(file="deny", readable=(Directory("/home/dev/.gitconfig", 1, 3),)))
    assert found[Access.READ] == {*NEEDED, "/home/dev/.gitconfig"}
    assert found[Access.WRITE] == OWN
    assert all(
        r.optional for r in rules(box(file="deny")) if r.path in NEEDED and r.access is Access.READ
    )


def test_with_files_allowed_writing_is_up_to_the_user_but_in_the_systems_trees() -> None:
    free = box(file="allow")
    assert "/" in granted(free)[Access.WRITE]
    assert (of(free, "ProtectSystem"), of(free, "ProtectHome")) == ("full", "no")


def test_what_the_policy_takes_is_in_the_unit_and_need_not_exist() -> None:
    taken = Mounts(
        ("/home/dev/.ssh",), ("/home/dev/work/.envrc",), ("/usr/bin/sudo",), ("/usr/lib",)
    )
    limited = box(
        mounts=taken,
        kept=(Directory("/home/dev/work/.git", 1, 3),),
        memory=1 << 30,
        tasks=100,
    )
    assert "-/home/dev/.ssh" in of(limited, "InaccessiblePaths")
    assert of(limited, "ReadOnlyPaths") == ["-/home/dev/work/.envrc"]
    assert of(limited, "NoExecPaths") == ["-/usr/bin/sudo"]
    assert of(limited, "ExecPaths") == ["-/usr/lib"]
    kept = "/home/dev/work/.git"
    assert of(limited, "BindPaths") == [(kept, kept, False, 16384)]
    assert (of(limited, "MemoryMax"), of(limited, "TasksMax")) == (1 << 30, 100)
    assert not {"MemoryMax", "TasksMax"} & {name for name, _ in made(box())}
    assert {name for name, _ in made(limited)} <= set(SIGNATURES) and marshalled(made(limited))


def test_a_unit_takes_no_text_that_systemd_would_read_as_a_line_of_its_own() -> None:
    for evil in ("/home/dev/a\nExecStopPost=+/bin/true", "/home/dev/a\rb"):
        with pytest.raises(ValueError, match="ReadWritePaths holds a control character"):
            made(box(evil))
        with pytest.raises(ValueError, match="InaccessiblePaths"):
            made(box(covered=(evil,)))
    assert of(box("/home/dev/a b"), "ReadWritePaths") == ["/home/dev/a b"]
