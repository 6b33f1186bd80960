"""The configuration of the daemons: agent-assembly.toml and one file per agent in agents.d.

A missing file or folder means the defaults; anything else that is not right is an
error that names file, line and key, and then nothing of the configuration is used.
"""

from __future__ import annotations

import ipaddress
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from aa import paths
from aa.model import AGENT_LAYERS, Layer
from aa.tomlfile import Document, InvalidFile, Problem, schema, validate
from aa.tomlfile import load as load_toml

AGENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
AGENT_FILES_LIMIT = 1000

PRIVILEGED_GROUPS = frozenset(
    "root sudo wheel admin adm disk kmem shadow docker lxd incus libvirt kvm systemd-journal "
    "aa-gateway aa-enforce aa-operators aa-proxy".split()
)
"""Groups that would hand a run the host, the journal or the guard. No agent may keep them."""

UNSAFE_VARIABLES = ("LD_", "GLIBC_", "GCONV_", "AA_")
"""Variables with these beginnings act before a run is confined, or speak for the guard."""

GUARDED_FOLDERS = tuple(
    str(p) for p in (paths.CONFIG_DIR, paths.RUNTIME_DIR, paths.STATE_DIR, paths.LOG_DIR)
) + ("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/run", "/sbin", "/sys", "/usr", "/var/log")
"""Never writable for a run, nor anything in them or around them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listen:
    """Ports on loopback. Both address families use the same ports."""

    front_port: int = paths.FRONT_PORT
    explicit_address: str = "127.0.0.1"
    explicit_port: int = paths.EXPLICIT_PORT
    dns_port: int = paths.DNS_PORT


@dataclass(frozen=True, slots=True)
class Gateway:
    socket: Path = paths.ENFORCE_SOCKET
    max_runs: int = 256
    max_runs_per_user: int = 64  # started by one user who is not root
    decisions_per_second: int = 2000  # of one run
    max_pending_approvals: int = 256
    max_pending_approvals_per_run: int = 16


@dataclass(frozen=True, slots=True)
class Audit:
    file: Path = paths.AUDIT_FILE
    max_bytes: int = 64 << 20
    keep: int = 8
    bytes_per_second_per_run: int = 256 << 10
    journal: bool = True


@dataclass(frozen=True, slots=True)
class Proxy:
    peek_seconds: float = 5.0
    connect_seconds: float = 10.0
    decide_seconds: float = 5.0
    idle_seconds: float = 900.0
    max_connections: int = 1024
    max_connections_per_run: int = 256
    max_connections_per_user: int = 512
    max_waiting: int = 128  # of these, for a person
    max_waiting_per_run: int = 32
    inspect_workers: int = 1
    explicit_users: tuple[str, ...] = ()
    ca_dir: Path = paths.STATE_DIR / "proxy-ca"
    """Where the workers find the intermediate."""

    @property
    def workers(self) -> int:
        """Inspection workers: no more than there are processors."""
        return min(self.inspect_workers, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Permission:
    """`users` may run `agents` as themselves and as the users in `run_as`."""

    users: tuple[str, ...]  # names, "@group", or "*"
    agents: tuple[str, ...]  # names, or "*"
    run_as: tuple[str, ...] = ()

    def names_caller(self, user: str, groups: Collection[str]) -> bool:
        return any(w in ("*", user) or (w[0] == "@" and w[1:] in groups) for w in self.users)

    def names_agent(self, agent: str) -> bool:
        return "*" in self.agents or agent in self.agents


@dataclass(frozen=True, slots=True)
class Launch:
    barrier_seconds: float = 10.0
    permissions: tuple[Permission, ...] = (Permission(users=("*",), agents=("*",)),)

    def permits(self, *, caller: str, groups: Collection[str], agent: str, user: str) -> bool:
        """Whether `caller`, a member of `groups`, may run `agent` as `user`. Root may always."""
        return caller == "root" or any(
            p.names_caller(caller, groups)
            and p.names_agent(agent)
            and (user == caller or user in p.run_as)
            for p in self.permissions
        )


@dataclass(frozen=True, slots=True)
class Agent:
    """What agents.d says about an agent; the defaults are those of an agent without a file."""

    name: str
    layers: frozenset[Layer]
    tags: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    user: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    listen: Listen = field(default_factory=Listen)
    gateway: Gateway = field(default_factory=Gateway)
    audit: Audit = field(default_factory=Audit)
    proxy: Proxy = field(default_factory=Proxy)
    launch: Launch = field(default_factory=Launch)
    layers: frozenset[Layer] = frozenset(AGENT_LAYERS)
    agents: Mapping[str, Agent] = field(default_factory=dict)

    def agent(self, name: str) -> Agent:
        """The agent of that name. Raises ValueError for what cannot be an agent's name."""
        if not AGENT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be an agent's name: use letters, digits and _ . -")
        return self.agents.get(name) or Agent(name, self.layers)


def load(
    path: Path = paths.CONFIG_FILE,
    agents_dir: Path = paths.AGENTS_DIR,
    *,
    owners: Collection[int] | None = None,
) -> Config:
    """Reads the whole configuration. Raises InvalidFile with every problem of every file."""
    problems: list[Problem] = []
    config = Config()
    try:
        config = _config(load_toml(path, schema("config"), owners=owners))
    except FileNotFoundError:
        pass  # no file: the defaults
    except InvalidFile as e:
        problems += e.problems
    agents: dict[str, Agent] = {}
    for file in _agent_files(agents_dir, problems):
        try:
            agent = _agent(load_toml(file, schema("agent"), owners=owners), file.stem, config)
            agents[agent.name] = agent
        except FileNotFoundError:
            problems.append(Problem(str(file), 1, "", "is gone or a dangling link", "remove it"))
        except InvalidFile as e:
            problems += e.problems
    if problems:
        raise InvalidFile(problems)
    return overridden(replace(config, agents=agents), os.environ)


def overridden(config: Config, environment: Mapping[str, str]) -> Config:
    """The configuration with what a unit's runtime drop-in sets (`aasm proxy start` writes these).

    `AA_LISTEN` is the explicit proxy's ADDRESS:PORT, `AA_GATEWAY` the enforce socket, `AA_CA_DIR`
    the intermediate's directory. Raises InvalidFile for a value that the file could not have either.
    """
    listen = environment.get("AA_LISTEN")
    if listen:
        address, _, text = listen.rpartition(":")
        port = int(text) if text.isdecimal() else 0
        data = {"explicit_address": address, "explicit_port": port}
        document = Document("the unit's environment, AA_LISTEN", {"listen": data}, "", "")
        problems = [*validate(document, schema("config")), *_config_problems(document)]
        if problems:
            raise InvalidFile(problems)
        config = replace(
            config, listen=replace(config.listen, explicit_address=address, explicit_port=port)
        )
    if environment.get("AA_GATEWAY"):
        gateway = replace(config.gateway, socket=Path(environment["AA_GATEWAY"]))
        config = replace(config, gateway=gateway)
    if environment.get("AA_CA_DIR"):
        config = replace(config, proxy=replace(config.proxy, ca_dir=Path(environment["AA_CA_DIR"])))
    return config


def folder_problem(text: str) -> tuple[str, str] | None:
    """Why a folder cannot be writable for a run, and what to do; None if it can.

    A folder is absolute or below `~/`, in its normal form, and neither one that
    programs outside the run trust nor one that contains such a folder.
    """
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        return "contains a control character", "remove it"
    if any(c in text for c in "*?["):
        return f"{text!r} has a wildcard", "name the folder itself; all below it is included"
    inside_home = text.startswith("~/")
    absolute = "/home" + text[1:] if inside_home else text
    if not absolute.startswith("/"):
        return f"{text!r} is neither absolute nor below ~/", "write ~/NAME or /NAME"
    if absolute.startswith("//") or posixpath.normpath(absolute) != absolute:
        fix = posixpath.normpath("/" + absolute.lstrip("/"))
        return f"{text!r} is not in its normal form", "no . or .., no // and no / at the end" + (
            "" if inside_home else f", as in {fix}"
        )
    if inside_home:
        return None
    for guarded in GUARDED_FOLDERS:
        if _within(absolute, guarded) or _within(guarded, absolute):
            return f"{text!r} would open {guarded} to the run", "name a folder elsewhere"
    return None


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _agent_files(folder: Path, problems: list[Problem]) -> list[Path]:
    try:
        names = sorted(p for p in folder.iterdir() if p.suffix == ".toml" and p.name[0] != ".")
    except FileNotFoundError:
        return []
    except OSError as e:
        problems.append(Problem(str(folder), 1, "", f"cannot be read: {e.strerror}"))
        return []
    if len(names) > AGENT_FILES_LIMIT:
        problems.append(Problem(str(folder), 1, "", f"has more than {AGENT_FILES_LIMIT} agents"))
        return []
    for file in names:
        if not AGENT_NAME.fullmatch(file.stem):
            fix = "letters, digits and _ . -, beginning with a letter or digit"
            problems.append(Problem(str(file), 1, "", "the name is not an agent's name", fix))
    return [file for file in names if AGENT_NAME.fullmatch(file.stem)]


def _table(kind: type[T], values: Mapping[str, Any]) -> T:
    """A section as its dataclass: lists become tuples, and values the type of the default."""
    converted: dict[str, Any] = {}
    for f in fields(cast(Any, kind)):
        if f.name in values:
            value = values[f.name]
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(f.default, (Path, float)):
                value = type(f.default)(value)
            converted[f.name] = value
    return kind(**converted)


def _config(document: Document) -> Config:
    data = document.data
    problems = list(_config_problems(document))
    if problems:
        raise InvalidFile(problems)
    launch = data.get("launch", {})
    defaults = Launch()
    return Config(
        listen=_table(Listen, data.get("listen", {})),
        gateway=_table(Gateway, data.get("gateway", {})),
        audit=_table(Audit, data.get("audit", {})),
        proxy=_table(Proxy, data.get("proxy", {})),
        launch=Launch(
            barrier_seconds=float(launch.get("barrier_seconds", defaults.barrier_seconds)),
            permissions=tuple(_table(Permission, p) for p in launch["permission"])
            if "permission" in launch
            else defaults.permissions,
        ),
        layers=_layers(data.get("layers")) or Config().layers,
    )


def _config_problems(document: Document) -> Iterator[Problem]:
    listen = _table(Listen, document.data.get("listen", {}))
    try:
        loopback = ipaddress.ip_address(listen.explicit_address).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        yield document.problem(
            ("listen", "explicit_address"),
            f"{listen.explicit_address!r} is not a loopback address",
            "127.0.0.1 or ::1; a proxy that others can reach would decide for them too",
        )
    ports: dict[int, str] = {}
    for name in ("front_port", "explicit_port", "dns_port"):
        port = getattr(listen, name)
        if port in ports:
            message = f"{port} is the port of {ports[port]} already"
            yield document.problem(("listen", name), message, "choose another")
        ports[port] = name
    proxy = _table(Proxy, document.data.get("proxy", {}))
    if proxy.max_connections_per_run > proxy.max_connections:
        yield document.problem(
            ("proxy", "max_connections_per_run"),
            f"{proxy.max_connections_per_run} is above max_connections, {proxy.max_connections}",
            "one run could take every connection; lower it",
        )
    for index, permission in enumerate(document.data.get("launch", {}).get("permission", ())):
        if "root" in permission.get("run_as", ()):
            path = ("launch", "permission", index, "run_as")
            yield document.problem(path, "nobody can run an agent as root", "name another user")


def _layers(names: list[str] | None) -> frozenset[Layer]:
    return frozenset(Layer(name) for name in names or ())


def _agent(document: Document, name: str, config: Config) -> Agent:
    problems = list(_agent_problems(document))
    if problems:
        raise InvalidFile(problems)
    data = dict(document.data)
    layers = _layers(data.pop("layers", None)) or config.layers
    return _table(Agent, {**data, "name": name, "layers": layers})


def _agent_problems(document: Document) -> Iterator[Problem]:
    data = document.data
    for index, folder in enumerate(data.get("state", ())):
        problem = folder_problem(folder)
        if problem:
            yield document.problem(("state", index), *problem)
    for index, group in enumerate(data.get("groups", ())):
        if group in PRIVILEGED_GROUPS:
            message = f"{group!r} would give a run power over the host or the guard"
            yield document.problem(("groups", index), message, "remove it")
    for index, variable in enumerate(data.get("environment", ())):
        if variable.startswith(UNSAFE_VARIABLES):
            message = f"{variable!r} acts before a run is confined, or speaks for the guard"
            yield document.problem(("environment", index), message, "set it in the command")
    if data.get("user") == "root":
        yield document.problem(("user",), "no agent runs as root", "name another user")
