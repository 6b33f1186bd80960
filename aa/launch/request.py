"""What a caller asks for and whether it may: agent, user and command of a run to be. Reads the user database only."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aa.config import PRIVILEGED_GROUPS, Agent, Config

DEFAULT_AGENT = "default"
OPERATORS = "aa-operators"
OWN_USERS = ("aa-gateway", "aa-proxy")

MAX_ARGUMENTS = 4096
MAX_ARGUMENT_BYTES = 128 << 10
"""Of one argument, as the kernel has it."""


class BadRequest(ValueError):
    """The request makes no sense; what to change."""


class NotPermitted(Exception):
    """The caller may not do this."""


@dataclass(frozen=True, slots=True)
class Request:
    """A run that may be: everything but the descriptors."""

    agent: Agent
    user: pwd.struct_passwd
    argv: tuple[str, ...]
    groups: tuple[int, ...]
    """Supplementary groups that it keeps."""


def resolve(config: Config, caller_uid: int, parameters: Mapping[str, Any]) -> Request:
    """Raises `BadRequest` or `NotPermitted`."""
    caller = _user_of(caller_uid)
    agent = _agent(config, parameters.get("agent"), parameters["argv"])
    user = _named(parameters.get("user") or agent.user or caller.pw_name)
    # Asking for groups takes several round trips to the user database: only where it matters.
    by_group = any(who.startswith("@") for p in config.launch.permissions for who in p.users)
    groups = group_names(caller) if by_group else frozenset()
    if not config.launch.permits(
        caller=caller.pw_name, groups=groups, agent=agent.name, user=user.pw_name
    ):
        raise NotPermitted(
            f"{caller.pw_name} may not run the agent {agent.name} as {user.pw_name}; "
            "[[launch.permission]] in agent-assembly.toml says who may"
        )
    refuse_user(user)
    argv = tuple(parameters["argv"]) or agent.command
    refuse_command(argv, agent)
    return Request(agent, user, argv, kept_groups(agent, user))


def _user_of(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise NotPermitted(f"uid {uid} is no user of this host") from None


def _named(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise BadRequest(f"there is no user {name!r} on this host") from None


def _agent(config: Config, name: str | None, argv: list[str]) -> Agent:
    """The named agent; without a name the one that the command is called like, if it is declared."""
    if name is None:
        command = os.path.basename(argv[0]) if argv else ""
        name = command if command in config.agents else DEFAULT_AGENT
    try:
        return config.agent(name)
    except ValueError as e:
        raise BadRequest(str(e)) from None


def refuse_user(user: pwd.struct_passwd) -> None:
    """No run is root or one of our own daemons, nor privileged by its primary group."""
    if user.pw_uid == 0 or user.pw_gid == 0:
        raise NotPermitted("an agent does not run as root; name another user with --user")
    if user.pw_name in OWN_USERS:
        raise NotPermitted(f"{user.pw_name} is a user of Agent Assembly itself")
    try:
        primary = grp.getgrgid(user.pw_gid).gr_name
    except KeyError:
        return
    if primary in PRIVILEGED_GROUPS:
        raise NotPermitted(
            f"the primary group of {user.pw_name} is {primary}, which a run cannot give up; "
            "name another user with --user"
        )


def refuse_command(argv: tuple[str, ...], agent: Agent) -> None:
    if not argv or not argv[0]:
        raise BadRequest(f"there is no command, and the agent {agent.name} declares none")
    if len(argv) > MAX_ARGUMENTS:
        raise BadRequest(f"more than {MAX_ARGUMENTS} arguments")
    for argument in argv:
        if "\0" in argument or len(argument.encode()) > MAX_ARGUMENT_BYTES:
            raise BadRequest("an argument is too long or holds a NUL")


def kept_groups(agent: Agent, user: pwd.struct_passwd) -> tuple[int, ...]:
    """The groups that the agent's file allows, as far as the user is in them."""
    if not agent.groups:
        return ()
    own = set(os.getgrouplist(user.pw_name, user.pw_gid))
    allowed = set()
    for name in agent.groups:
        try:
            allowed.add(grp.getgrnam(name).gr_gid)
        except KeyError:
            continue
    return tuple(sorted(own & allowed))


def group_names(user: pwd.struct_passwd) -> frozenset[str]:
    names = set()
    for gid in os.getgrouplist(user.pw_name, user.pw_gid):
        try:
            names.add(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue
    return frozenset(names)


def may_control(caller_uid: int, *, run_uid: int, run_caller: int) -> bool:
    """Whether a caller may signal, end and wait for a run: its own, or everyone's for operators."""
    return caller_uid in (run_uid, run_caller) or is_operator(caller_uid)


def is_operator(uid: int) -> bool:
    """Root, and members of the operators' group as the user database has it now."""
    if uid == 0:
        return True
    try:
        return OPERATORS in group_names(pwd.getpwuid(uid))
    except KeyError:
        return False
