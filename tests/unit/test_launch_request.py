"""Who may ask for which run, and what comes along from the caller."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aa.config import Agent, Config, Launch, Permission
from aa.launch import environment, request, shim, streams
from aa.launch.request import BadRequest, NotPermitted
from aa.model import AGENT_LAYERS

USERS = {
    "root": (0, 0, {"root"}),
    "ada": (5001, 5001, {"ada", "team"}),
    "bob": (5002, 5002, {"bob"}),
    "whale": (5003, 999, {"docker"}),
    "aa-proxy": (5004, 5004, {"aa-proxy"}),
    "op": (5005, 5005, {"op", "aa-operators"}),
}
GROUPS = {"root": 0, "ada": 5001, "bob": 5002, "docker": 999, "team": 5100, "aa-proxy": 5004,
          "op": 5005, "aa-operators": 5200, "video": 44}  # fmt: skip


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str) -> pwd.struct_passwd:
        uid, gid, _ = USERS[name]
        return pwd.struct_passwd((name, "x", uid, gid, "", f"/home/{name}", "/bin/sh"))

    def by_uid(uid: int) -> pwd.struct_passwd:
        return entry(next(n for n, (u, _, _) in USERS.items() if u == uid))

    def lookup(find: Any) -> Any:
        def found(key: Any) -> Any:
            try:
                return find(key)
            except (KeyError, StopIteration):
                raise KeyError(key) from None

        return found

    def group(name: str) -> SimpleNamespace:
        return SimpleNamespace(gr_name=name, gr_gid=GROUPS[name])

    monkeypatch.setattr(request.pwd, "getpwnam", lookup(entry))
    monkeypatch.setattr(request.pwd, "getpwuid", lookup(by_uid))
    monkeypatch.setattr(request.grp, "getgrnam", lookup(group))
    by_gid = {gid: name for name, gid in GROUPS.items()}
    monkeypatch.setattr(request.grp, "getgrgid", lookup(lambda gid: group(by_gid[gid])))
    monkeypatch.setattr(
        request.os, "getgrouplist", lambda name, gid: [gid, *(GROUPS[g] for g in USERS[name][2])]
    )


LAYERS = frozenset(AGENT_LAYERS)
CONFIG = Config(
    launch=Launch(
        permissions=(
            Permission(users=("*",), agents=("default", "coder", "idle")),
            Permission(users=("@team",), agents=("lent",), run_as=("bob",)),
        )
    ),
    agents={
        "coder": Agent("coder", LAYERS, groups=("video", "team", "docker")),
        "idle": Agent("idle", LAYERS, command=("/bin/idle", "-v")),
        "lent": Agent("lent", LAYERS, user="bob"),
    },
)


def ask(uid: int = 5001, **parameters: Any) -> request.Request:
    parameters.setdefault("argv", ["prog"])
    return request.resolve(CONFIG, uid, parameters)


def test_a_caller_runs_as_itself_and_as_the_default_agent() -> None:
    asked = ask()
    assert (asked.user.pw_name, asked.agent.name, asked.argv) == ("ada", "default", ("prog",))


def test_the_agent_is_the_one_declared_under_the_commands_name() -> None:
    assert ask(argv=["/usr/bin/coder", "-x"]).agent.name == "coder"
    assert ask(argv=["/usr/bin/coder"], agent="default").agent.name == "default"
    assert ask(argv=["undeclared"]).agent.name == "default"


def test_a_command_may_come_from_the_agents_file() -> None:
    assert ask(argv=[], agent="idle").argv == ("/bin/idle", "-v")
    with pytest.raises(BadRequest, match="no command"):
        ask(argv=[])
    with pytest.raises(BadRequest, match="no command"):
        ask(argv=[""])


def test_another_user_needs_a_permission_that_names_it() -> None:
    assert ask(agent="lent").user.pw_name == "bob"
    with pytest.raises(NotPermitted, match="may not run the agent default as bob"):
        ask(user="bob")
    with pytest.raises(NotPermitted):
        ask(uid=5002, agent="lent")
    assert ask(uid=0, user="bob").user.pw_name == "bob"


def test_an_agent_that_nobody_may_run_is_refused() -> None:
    with pytest.raises(NotPermitted):
        ask(agent="unlisted")


@pytest.mark.parametrize(
    ("name", "why"), [("root", "root"), ("whale", "docker"), ("aa-proxy", "Agent Assembly")]
)
def test_root_privileged_groups_and_our_own_users_do_not_run_agents(name: str, why: str) -> None:
    with pytest.raises(NotPermitted, match=why):
        ask(uid=0, user=name)


def test_a_user_that_is_not_there_is_a_bad_request_and_a_strange_caller_not_permitted() -> None:
    with pytest.raises(BadRequest, match="no user"):
        ask(uid=0, user="ghost")
    with pytest.raises(NotPermitted, match="uid 4242"):
        ask(uid=4242)


@pytest.mark.parametrize("argv", [["a", "b\0c"], ["a"] * 5000, ["a", "b" * (129 << 10)]])
def test_a_command_line_out_of_bounds_is_refused(argv: list[str]) -> None:
    with pytest.raises(BadRequest):
        ask(argv=argv)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(BadRequest, match="agent's name"):
        ask(agent="../../etc")


def test_groups_are_kept_only_where_the_agent_may_and_the_user_is_a_member() -> None:
    assert ask(argv=["coder"]).groups == (5100,)
    assert ask(uid=5002, argv=["coder"]).groups == ()


def test_a_run_is_controlled_by_its_own_and_by_operators() -> None:
    def may(uid: int) -> bool:
        return request.may_control(uid, run_uid=5002, run_caller=5001)

    assert may(5001) and may(5002) and may(0) and may(5005)
    assert not may(5003) and not may(4242)


# What comes along


def run_environment(caller: dict[str, str], *allowed: str, proxied: bool = True) -> dict[str, str]:
    return environment.of_run(
        caller,
        allowed=allowed,
        user="ada",
        home="/home/ada",
        shell="/bin/sh",
        run="r1",
        agent="a",
        proxied=proxied,
    )


def test_only_allowed_variables_pass() -> None:
    found = run_environment(
        {
            "TERM": "x",
            "LC_ALL": "C",
            "LD_PRELOAD": "x",
            "https_proxy": "x",
            "TOKEN": "t",
            "HOME": "/x",
        }
    )
    assert (found["TERM"], found["LC_ALL"], found["HOME"]) == ("x", "C", "/home/ada")
    assert not {"LD_PRELOAD", "https_proxy", "TOKEN"} & set(found)
    assert run_environment({"TOKEN": "t"}, "TOKEN")["TOKEN"] == "t"


def test_a_caller_cannot_say_which_run_it_is() -> None:
    found = run_environment({"AA_RUN": "x", "AA_AGENT": "x", "USER": "root"}, "AA_RUN", "USER")
    assert (found["AA_RUN"], found["AA_AGENT"], found["USER"]) == ("r1", "a", "ada")


def test_programs_of_a_proxied_run_look_for_authorities_in_the_systems_store() -> None:
    found = run_environment({"SSL_CERT_FILE": "/home/ada/own.pem"})
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"):
        assert found[name] == "/etc/ssl/certs/ca-certificates.crt"
    assert not {"SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"} & set(run_environment({}, proxied=False))


def test_an_agents_file_can_let_the_callers_authorities_in() -> None:
    found = run_environment({"SSL_CERT_FILE": "/home/ada/own.pem"}, "SSL_CERT_FILE")
    assert found["SSL_CERT_FILE"] == "/home/ada/own.pem"
    assert found["REQUESTS_CA_BUNDLE"] == "/etc/ssl/certs/ca-certificates.crt"


def test_an_environment_that_is_too_large_or_none_is_refused() -> None:
    with pytest.raises(environment.BadEnvironment):
        run_environment({f"LC_{n}": "" for n in range(600)})
    with pytest.raises(environment.BadEnvironment):
        run_environment({"LC_ALL": "x" * (129 << 10)})
    for wrong in ("NOEQUALS", "A=b\0c"):
        with pytest.raises(environment.BadEnvironment):
            environment.parse([wrong])


def test_names_that_no_shell_sets_are_left_out_and_the_last_value_wins() -> None:
    assert environment.parse(["A=1", "BASH_FUNC_x%%=() { :; }", "=x", "A=2"]) == {"A": "2"}


# Descriptors


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_pipes_files_null_and_pairs_may_be_streams(pipe: tuple[int, int], tmp_path: Path) -> None:
    for fd in pipe:
        assert shim.stream_refusal(fd) is None
    with open(tmp_path / "f", "w") as file, open("/dev/null") as null:
        assert shim.stream_refusal(file.fileno()) is None
        assert shim.stream_refusal(null.fileno()) is None
    a, b = socket.socketpair()
    with a, b:
        assert shim.stream_refusal(a.fileno()) is None
    master, slave = os.openpty()
    assert shim.stream_refusal(slave) is None
    os.close(master)
    os.close(slave)


def test_sockets_that_lead_elsewhere_may_not(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "s"))
    accepted, _ = listener.accept()
    with listener, client, accepted, socket.socket(socket.AF_INET) as inet:
        assert "connected to a service" in (shim.stream_refusal(client.fileno()) or "")
        assert "connected to a service" in (shim.stream_refusal(accepted.fileno()) or "")
        assert "network socket" in (shim.stream_refusal(inet.fileno()) or "")
        assert shim.stream_refusal(listener.fileno())
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0aa-test-{os.getpid()}")
    abstract.listen()
    reached = socket.socket(socket.AF_UNIX)
    reached.connect(abstract.getsockname())
    datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with abstract, reached, datagrams[0], datagrams[1]:
        assert "connected to a service" in (shim.stream_refusal(reached.fileno()) or "")
        assert "not a stream" in (shim.stream_refusal(datagrams[0].fileno()) or "")


def test_what_is_no_stream_at_all_may_not_be_one(tmp_path: Path) -> None:
    directory, event = os.open(tmp_path, os.O_RDONLY), os.eventfd(0)
    closed = os.dup(event)
    os.close(closed)
    assert shim.stream_refusal(directory) == "it is a directory"
    assert shim.stream_refusal(event)
    assert shim.stream_refusal(closed)
    os.close(directory)
    os.close(event)


def test_a_terminal_that_is_the_callers_own_is_refused() -> None:
    master, slave = os.openpty()
    try:
        own = os.fstat(slave).st_rdev
        streams.refuse_streams([slave] * 3, caller_terminal=0)
        with pytest.raises(streams.BadStream, match="caller's own terminal"):
            streams.refuse_streams([slave] * 3, caller_terminal=own)
        with pytest.raises(streams.BadStream, match="not one made for the run"):
            streams.refuse_streams([master] * 3, caller_terminal=0)
    finally:
        os.close(master)
        os.close(slave)


def test_descriptors_leave_the_call_and_are_closed_with_their_holder(pipe: tuple[int, int]) -> None:
    call: Any = SimpleNamespace(fds=[os.dup(fd) for fd in pipe])
    first = call.fds[0]
    taken = streams.Descriptors(call)
    assert call.fds == [] and taken[0] == first
    for position in (2, -1):
        with pytest.raises(streams.BadStream):
            taken[position]
    del taken
    with pytest.raises(OSError):
        os.fstat(first)


def test_a_directory_descriptor_is_known_by_the_path_that_the_kernel_has(tmp_path: Path) -> None:
    place = tmp_path / "here"
    place.mkdir()
    fd = os.open(place, os.O_PATH)
    found = streams.directory_of(fd)
    assert (found.path, found.inode) == (str(place), place.stat().st_ino)
    place.rename(tmp_path / "there")
    assert streams.directory_of(fd).path == str(tmp_path / "there")
    (tmp_path / "there").rmdir()
    with pytest.raises(streams.BadStream, match="no path"):
        streams.directory_of(fd)
    os.close(fd)
    with open(os.devnull) as null, pytest.raises(streams.BadStream, match="not a folder"):
        streams.directory_of(null.fileno())


@pytest.mark.parametrize("name", ["a\nExecStopPost=+", "a\rb", "a\x7fb"])
def test_a_directory_that_would_write_a_line_of_its_own_into_the_unit_is_refused(
    tmp_path: Path, name: str
) -> None:
    for place, refused in ((tmp_path / name, True), (tmp_path / "a b%i 'ü'", False)):
        place.mkdir()
        fd = os.open(place, os.O_PATH)
        try:
            if refused:
                with pytest.raises(streams.BadStream, match="control character"):
                    streams.directory_of(fd)
            else:
                assert streams.directory_of(fd).path == str(place)
        finally:
            os.close(fd)
