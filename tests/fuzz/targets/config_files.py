"""The configuration and agents' files: values, or problems that name a line."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from aa.config import Config, folder_problem, load
from aa.model import AGENT_LAYERS
from aa.tomlfile import InvalidFile
from tests.fuzz.mutate import words

SHIPPED = Path(__file__).parents[3] / "etc/agent-assembly"
FOLDER = Path(tempfile.mkdtemp(prefix="aa-fuzz-"))
(FOLDER / "agents.d").mkdir()

WORDS = (
    b"[listen]", b"[gateway]", b"[audit]", b"[proxy]", b"[[launch.permission]]", b'users = ["@dev"]',
    b'agents = ["*"]', b'layers = ["proxy", "kernel"]', b'user = "root"', b'state = ["~/.x"]',
    b'environment = ["LD_PRELOAD"]', b'groups = ["docker"]', b'command = ["x"]', b"front_port = 8899",
    b"max_runs = 10", b'description = "x"', b'"~/../../etc"', b"1e400", b"-1", b'"\\u0000"',
)  # fmt: skip
mutate = words(WORDS)


def seeds() -> Iterator[bytes]:
    yield b"\0" + (SHIPPED / "agent-assembly.toml").read_bytes()
    lines = (SHIPPED / "agent-assembly.toml").read_bytes().split(b"\n")
    stated = [line.lstrip(b"# ") if b" = " in line else line for line in lines]
    yield b"\0" + b"\n".join(stated)
    yield b'\0[[launch.permission]]\nusers = ["a"]\nagents = ["b"]\nas = ["c"]\n'
    for path in sorted((SHIPPED / "agents.d").glob("*.toml")):
        yield b"\1" + path.read_bytes()
    yield b'\1user = "x"\nstate = ["~/.x"]\nenvironment = ["FOO"]\nlayers = ["proxy"]\n'


def one(data: bytes) -> None:
    if not data:
        return
    which, text = data[0] & 1, data[1:]
    (FOLDER / "c.toml").write_bytes(b"" if which else text)
    (FOLDER / "agents.d" / "x.toml").write_bytes(text if which else b"")
    try:
        config = load(FOLDER / "c.toml", FOLDER / "agents.d")
    except InvalidFile as e:
        lines = text.count(b"\n") + 1
        assert e.problems and all(1 <= p.line <= lines and p.message for p in e.problems)
        return
    _check(config)


def _check(config: Config) -> None:
    assert config.layers <= frozenset(AGENT_LAYERS)
    for name in ("x", "default"):
        agent = config.agent(name)
        assert agent.user != "root"
        assert not any(folder_problem(folder) for folder in agent.state)
        config.launch.permits(caller="dev", groups=frozenset(("g",)), agent=name, user="dev")
