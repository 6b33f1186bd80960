"""The one way that `aasm` fails towards a person: what happened, what to do, an exit code."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import click

from aa.paths import CONTROL_SOCKET, RUN_GATEWAY_SOCKET
from aa.varlink import Client, VarlinkError
from aa.varlink.codec import ProtocolError

NO = 1
NOT_RUNNING = 3
NOT_PERMITTED = 4

OPERATORS = "aa-operators"


class Failure(click.ClickException):
    """What happened, with a hint of what to do about it."""

    def __init__(self, what: str, *, hint: str = "", code: int = NO) -> None:
        super().__init__(what)
        self.hint = hint
        self.exit_code = code

    def show(self, file: object = None) -> None:
        click.echo(f"{click.style('aasm:', fg='red', bold=True)} {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


@contextlib.contextmanager
def connected(path: Path, *, timeout: float | None = 10.0) -> Iterator[Client]:
    """A client of one of the sockets; whatever goes wrong becomes a `Failure`."""
    try:
        with Client(path, timeout=timeout) as client:
            yield client
    except VarlinkError as e:
        code = NOT_PERMITTED if e.name in ("PermissionDenied", "NotPermitted") else NO
        raise Failure(str(e), code=code) from e
    except (FileNotFoundError, ConnectionRefusedError):
        if path == RUN_GATEWAY_SOCKET or not RUN_GATEWAY_SOCKET.exists():
            raise Failure(
                f"nobody listens on {path}",
                hint="is the service running? try `systemctl status aa-gateway aa-launch`",
                code=NOT_RUNNING,
            ) from None
        raise Failure(
            "this is inside a governed run; operators' commands do not work here",
            hint="`aasm why` tells what this run was refused",
            code=NOT_PERMITTED,
        ) from None
    except PermissionError:
        raise Failure(
            f"you may not use {path}", hint=_membership_hint(), code=NOT_PERMITTED
        ) from None
    except TimeoutError:
        raise Failure(
            f"no answer from {path}", hint="see `systemctl status aa-gateway`", code=NOT_RUNNING
        ) from None
    except (ProtocolError, ConnectionResetError) as e:
        raise Failure(f"{path}: {e}", hint="see `journalctl -u aa-gateway -n 20`") from e


def control(*, timeout: float | None = 10.0) -> contextlib.AbstractContextManager[Client]:
    """A client of the gateway's control socket."""
    return connected(CONTROL_SOCKET, timeout=timeout)


def _membership_hint() -> str:
    name = pwd.getpwuid(os.getuid()).pw_name
    try:
        member = name in grp.getgrnam(OPERATORS).gr_mem
    except KeyError:
        return f"the group {OPERATORS} does not exist; is agent-assembly installed?"
    if member:
        return f"{name} is in {OPERATORS}, but this session began before; log in again"
    return f"operators are in the group {OPERATORS}: `sudo adduser {name} {OPERATORS}`, or use sudo"
