"""agent-assembly.toml and agents.d: defaults, strictness, and who may run what."""

from __future__ import annotations

from pathlib import Path

import pytest

from aa import paths
from aa.config import (
    Agent,
    Config,
    Launch,
    Permission,
    folder_problem,
    load,
    overridden,
)
from aa.model import AGENT_LAYERS, Layer
from aa.tomlfile import InvalidFile, Problem

SHIPPED = Path(__file__).parents[2] / "etc/agent-assembly"


def loaded(tmp_path: Path, text: str, **agents: str) -> Config:
    (tmp_path / "c.toml").write_text(text)
    folder = tmp_path / "agents.d"
    folder.mkdir(exist_ok=True)
    for name, content in agents.items():
        (folder / f"{name}.toml").write_text(content)
    return load(tmp_path / "c.toml", folder)


def problems(tmp_path: Path, text: str, **agents: str) -> tuple[Problem, ...]:
    with pytest.raises(InvalidFile) as caught:
        loaded(tmp_path, text, **agents)
    return caught.value.problems


def test_missing_files_mean_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "none.toml", tmp_path / "none.d") == Config()


def test_defaults_are_those_of_the_well_known_paths() -> None:
    config = Config()
    assert config.listen.front_port == paths.FRONT_PORT
    assert config.gateway.socket == paths.ENFORCE_SOCKET
    assert config.audit.file == paths.AUDIT_FILE
    assert config.layers == frozenset(AGENT_LAYERS)


def test_shipped_file_says_the_defaults() -> None:
    assert load(SHIPPED / "agent-assembly.toml", SHIPPED / "agents.d") == Config()


def test_shipped_file_shows_every_key() -> None:
    text = (SHIPPED / "agent-assembly.toml").read_text()
    config = Config()
    for section in (config.listen, config.gateway, config.audit, config.proxy):
        for name in type(section).__dataclass_fields__:
            assert f"\n{name} = " in text


def test_reads_every_section(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        """
        layers = ["proxy"]
        listen = { front_port = 1, explicit_address = "::1", explicit_port = 2, dns_port = 3 }
        gateway = { socket = "/run/x", max_runs = 4, decisions_per_second = 5 }
        audit = { file = "/var/a", max_bytes = 65536, keep = 6, journal = false }
        [proxy]
        peek_seconds = 1
        max_connections = 300
        explicit_users = ["dev"]
        [launch]
        barrier_seconds = 2.5
        [[launch.permission]]
        users = ["@devs", "ann"]
        agents = ["codex"]
        run_as = ["agent"]
        """,
    )
    assert config.layers == {Layer.PROXY}
    assert config.listen.explicit_address == "::1"
    assert config.gateway.socket == Path("/run/x")
    assert config.audit.journal is False
    assert isinstance(config.proxy.peek_seconds, float)
    assert config.proxy.explicit_users == ("dev",)
    assert config.launch == Launch(2.5, (Permission(("@devs", "ann"), ("codex",), ("agent",)),))


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("typo = 1", "typo", "unknown key"),
        ("[listen]\nfront_prt = 1", "listen.front_prt", "unknown key"),
        ("layers = []", "layers", "empty list"),
        ("layers = ['gateway']", "layers[0]", "not one of"),
        ("layers = ['sdk', 'sdk']", "layers", "twice"),
        ("[listen]\nfront_port = 0", "listen.front_port", "below 1"),
        ("[listen]\ndns_port = 65536", "listen.dns_port", "above 65535"),
        ("[listen]\nfront_port = 8899", "listen.explicit_port", "port of front_port already"),
        ("[listen]\nexplicit_address = '0.0.0.0'", "listen.explicit_address", "loopback"),
        ("[listen]\nexplicit_address = 'localhost'", "listen.explicit_address", "loopback"),
        ("[gateway]\nsocket = 'x'", "gateway.socket", "not valid here"),
        ("[proxy]\npeek_seconds = -1", "proxy.peek_seconds", "below"),
        ("[proxy]\nmax_connections = 2", "proxy.max_connections_per_run", "above max_connections"),
        ("[proxy]\nexplicit_users = ['a b']", "proxy.explicit_users[0]", "not valid here"),
        ("[[launch.permission]]\nusers = ['*']", "launch.permission[0]", "'agents' is missing"),
        (
            "[[launch.permission]]\nusers = []\nagents = ['*']",
            "launch.permission[0].users",
            "empty list",
        ),
        (
            "[[launch.permission]]\nusers = ['*']\nagents = ['*']\nrun_as = ['root']",
            "launch.permission[0].run_as",
            "as root",
        ),
    ],
)
def test_mistakes_name_their_key(tmp_path: Path, text: str, key: str, words: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.key == key
    assert words in problem.message


# -- agents ------------------------------------------------------------------------------------


def test_agent_without_a_file_has_the_defaults() -> None:
    assert Config().agent("codex") == Agent("codex", frozenset(AGENT_LAYERS))


def test_agent_without_layers_takes_those_of_the_configuration(tmp_path: Path) -> None:
    config = loaded(tmp_path, "layers = ['kernel']", a="tags = ['x']", b="layers = ['sdk']")
    assert config.agent("a").layers == {Layer.KERNEL}
    assert config.agent("b").layers == {Layer.SDK}
    assert config.agent("c").layers == {Layer.KERNEL}


def test_reads_every_key_of_an_agent(tmp_path: Path) -> None:
    text = """
    layers = ["sdk", "proxy"]
    tags = ["team:platform"]
    environment = ["EDITOR"]
    state = ["~/.cache", "/srv/data"]
    groups = ["video"]
    command = ["/bin/true", "--", "-x"]
    user = "agent"
    """
    agent = loaded(tmp_path, "", a=text).agent("a")
    assert agent == Agent(
        "a",
        frozenset({Layer.SDK, Layer.PROXY}),
        tags=("team:platform",),
        environment=("EDITOR",),
        state=("~/.cache", "/srv/data"),
        groups=("video",),
        command=("/bin/true", "--", "-x"),
        user="agent",
    )


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("layers = []", "layers", "empty list"),
        ("tags = []", "tags", "empty list"),
        ("groups = ['docker']", "groups[0]", "power over the host"),
        ("groups = ['video', 'aa-operators']", "groups[1]", "power over the host"),
        ("environment = ['LD_PRELOAD']", "environment[0]", "before a run is confined"),
        ("environment = ['A=b']", "environment[0]", "not valid here"),
        ("state = ['cache']", "state[0]", "neither absolute nor below"),
        ("user = 'root'", "user", "as root"),
        ("command = ['a\\u0000b']", "command[0]", "not valid here"),
        ("command = 'a b'", "command", "must be a list"),
        ("[sandbox]\nown_bus = true", "sandbox", "not built"),
        ("layer = ['sdk']", "layer", "unknown key"),
    ],
)
def test_mistakes_in_an_agent_name_their_key(
    tmp_path: Path, text: str, key: str, words: str
) -> None:
    text = text.replace("'a\\u0000b'", '"a\\u0000b"')
    (problem,) = problems(tmp_path, "", a=text)
    assert problem.file.endswith("agents.d/a.toml")
    assert problem.key == key
    assert words in problem.message


def test_problems_of_all_files_are_told_together(tmp_path: Path) -> None:
    found = problems(tmp_path, "x = 1", a="y = 1", b="z = 1", c="tags = ['ok']")
    assert [p.key for p in found] == ["x", "y", "z"]


def test_file_name_must_be_an_agents_name(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "", **{"a b": "tags = ['x']"})
    assert "not an agent's name" in problem.message


def test_files_of_other_kinds_in_agents_d_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "agents.d"
    folder.mkdir()
    (folder / "README").write_text("not toml")
    (folder / ".a.toml").write_text("an editor's own")
    assert loaded(tmp_path, "").agents == {}


def test_agent_file_writable_by_others_is_refused(tmp_path: Path) -> None:
    loaded(tmp_path, "", a="tags = ['x']")
    (tmp_path / "agents.d/a.toml").chmod(0o666)
    with pytest.raises(InvalidFile, match="can be written"):
        load(tmp_path / "c.toml", tmp_path / "agents.d")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\n", "-a", ".a", "a" * 64, "a\0"])
def test_agent_refuses_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be an agent's name"):
        Config().agent(name)


# -- who may run what --------------------------------------------------------------------------


def test_by_default_everybody_runs_any_agent_as_themselves_only() -> None:
    launch = Launch()
    assert launch.permits(caller="dev", groups=(), agent="codex", user="dev")
    assert not launch.permits(caller="dev", groups=(), agent="codex", user="other")


def test_run_as_needs_caller_agent_and_user_in_one_permission() -> None:
    launch = Launch(
        permissions=(
            Permission(("@devs",), ("codex",), ("bot",)),
            Permission(("ann",), ("claude-code",)),
        )
    )
    assert launch.permits(caller="dev", groups=("devs",), agent="codex", user="bot")
    assert not launch.permits(caller="dev", groups=("devs",), agent="claude-code", user="bot")
    assert not launch.permits(caller="dev", groups=("others",), agent="codex", user="bot")
    assert not launch.permits(caller="devs", groups=(), agent="codex", user="bot")
    assert not launch.permits(caller="ann", groups=(), agent="claude-code", user="bot")
    assert launch.permits(caller="ann", groups=(), agent="claude-code", user="ann")


def test_no_permission_permits_root_alone() -> None:
    launch = Launch(permissions=())
    assert launch.permits(caller="root", groups=(), agent="codex", user="dev")
    assert not launch.permits(caller="dev", groups=(), agent="codex", user="dev")


# -- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["~/.cache", "/srv/x", "/home/dev/work", "/var/tmp/x"])
def test_folders_that_may_be_writable(folder: str) -> None:
    assert folder_problem(folder) is None


@pytest.mark.parametrize(
    "folder",
    ["", ".", "x", "~", "~x/y", "~/", "~/..", "~/a/../..", "~/a/", "//etc", "/", "/etc", "/etc/x"]
    + ["/var", "/var/lib", "/var/lib/agent-assembly/gateway", "/run", "/usr/bin", "/proc/self"]
    + ["/srv/../etc", "/srv/./x", "/srv//x", "/srv/\0", "/srv/a\nb", "~/*"],
)
def test_folders_that_may_not_be_writable(folder: str) -> None:
    assert folder_problem(folder) is not None


def test_a_drop_in_moves_the_explicit_proxy_the_gateways_socket_and_the_authority() -> None:
    moved = overridden(
        Config(),
        {
            "AA_LISTEN": "127.0.0.1:3128",
            "AA_GATEWAY": "/run/other/enforce",
            "AA_CA_DIR": "/srv/authority",
        },
    )
    assert moved.proxy.ca_dir == Path("/srv/authority")
    assert (moved.listen.explicit_address, moved.listen.explicit_port) == ("127.0.0.1", 3128)
    assert moved.gateway.socket == Path("/run/other/enforce")
    assert overridden(Config(), {}) == Config()


@pytest.mark.parametrize(
    "listen", ["10.0.0.1:3128", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:8898", ":1"]
)
def test_a_drop_in_cannot_say_what_the_file_cannot(listen: str) -> None:
    with pytest.raises(InvalidFile, match="AA_LISTEN"):
        overridden(Config(), {"AA_LISTEN": listen})
