"""`aasm proxy`: the proxy and what it needs, as one thing to start, stop and look at."""

from __future__ import annotations

import os
from pathlib import Path

import click

from aa import config as configuration
from aa.cli.ca import install_ca, uninstall_ca
from aa.cli.errors import NOT_PERMITTED, NOT_RUNNING, Failure
from aa.cli.output import json_option, print_json, print_table
from aa.cli.units import systemctl, unit_states
from aa.config import Listen
from aa.paths import ENFORCE_SOCKET
from aa.tomlfile import InvalidFile

SERVICE = "aa-proxy.service"
SOCKET = "aa-proxy.socket"
READERS = ("aa-proxy.service", "aa-redirect.service", "aa-ebpf.service")
"""The services that must know where the proxy listens."""

RUNTIME_UNITS = Path("/run/systemd/system")
DROP_IN = "50-aasm-proxy.conf"


@click.group()
def proxy() -> None:
    """Start, stop and look at the proxy."""


@proxy.command(
    epilog="""\b
Examples:
  aasm proxy start
  aasm proxy start --listen 127.0.0.1:3128     explicit proxy elsewhere, until the next boot
  aasm proxy start --gateway /run/other/enforce
  aasm proxy start --ca-dir /srv/authority/proxy-ca

The same as `systemctl start aa-proxy`, which also starts the gateway, the redirect and
the kernel layer. --listen, --gateway and --ca-dir make a runtime drop-in below /run/systemd/system
that is gone after a reboot; without them, an earlier one is removed. So does [listen] in
agent-assembly.toml where it differs from what the units ship. The rules of the redirect and
the kernel's guard are rendered again for the new place."""
)
@click.option(
    "--listen", metavar="ADDRESS:PORT", help="Where the explicit proxy listens (loopback)."
)
@click.option(
    "--gateway",
    type=click.Path(path_type=Path),
    help="The gateway's enforce socket that the proxy asks.",
)
@click.option(
    "--ca-dir",
    type=click.Path(path_type=Path),
    help="Where the inspection workers find the intermediate of an authority.",
)
def start(listen: str | None, gateway: Path | None, ca_dir: Path | None) -> None:
    """Start the proxy and everything it needs."""
    changed = _write_drop_ins(_listeners(listen), listen, gateway, ca_dir)
    if changed:
        systemctl("daemon-reload")
        systemctl("stop", SERVICE, SOCKET)
        systemctl("start", SOCKET)
        systemctl("restart", *READERS)
    systemctl("start", SERVICE)
    click.echo(f"{SERVICE} is running", err=True)


def _listeners(listen: str | None) -> Listen:
    """What the configuration says, with --listen in place of the explicit listener."""
    environment = {"AA_LISTEN": listen} if listen else {}
    try:
        found = configuration.overridden(configuration.load(), environment).listen
    except InvalidFile as e:
        raise Failure(str(e.problems[0]), hint="nothing was changed", code=2) from e
    if ":" in found.explicit_address:
        raise Failure(
            f"{found.explicit_address}: the explicit proxy listens on IPv4 loopback alone", code=2
        )
    return found


def _write_drop_ins(
    listeners: Listen, listen: str | None, gateway: Path | None, ca_dir: Path | None
) -> bool:
    """Makes the drop-ins say this and no more. Returns True when anything changed.

    The socket unit has one when the listeners are not those that it was shipped with.
    """
    environment = f"Environment=AA_LISTEN={listen}\n" if listen else ""
    if gateway and gateway != ENFORCE_SOCKET:
        environment += f"Environment=AA_GATEWAY={gateway}\n"
    if ca_dir:
        environment += f"Environment=AA_CA_DIR={ca_dir.absolute()}\n"
    wanted = {unit: f"[Service]\n{environment}" if environment else "" for unit in READERS}
    wanted[SOCKET] = "" if listeners == Listen() else _socket_drop_in(listeners)
    changed = False
    for unit, text in wanted.items():
        changed |= _put(RUNTIME_UNITS / f"{unit}.d" / DROP_IN, text)
    return changed


def _socket_drop_in(listen: Listen) -> str:
    both = ("127.0.0.1", "[::1]")
    lines = ["[Socket]", "ListenStream=", "ListenDatagram="]
    lines += [f"ListenStream={a}:{listen.front_port}" for a in both]
    lines += [f"ListenStream={listen.explicit_address}:{listen.explicit_port}"]
    for kind in ("ListenStream", "ListenDatagram"):
        lines += [f"{kind}={a}:{listen.dns_port}" for a in both]
    return "\n".join([*lines, ""])


def _put(path: Path, text: str) -> bool:
    before = path.read_text() if path.exists() else ""
    if before == text:
        return False
    try:
        if text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        else:
            os.unlink(path)
    except PermissionError as e:
        raise Failure(f"{e.filename}: not permitted", hint="use sudo", code=NOT_PERMITTED) from e
    return True


@proxy.command(
    epilog="""\b
Examples:
  aasm proxy stop

The rules stay: a governed run reaches nothing while the proxy is stopped. New connections
wait in the listeners' queue, which systemd holds, until the proxy is back."""
)
def stop() -> None:
    """Stop the proxy. Nothing is opened by that."""
    systemctl("stop", SERVICE)
    click.echo(f"{SERVICE} is stopped; governed runs reach nothing until it is back", err=True)


@proxy.command(
    epilog="""\b
Examples:
  aasm proxy status || sudo aasm proxy start
  aasm proxy status --json

Exits with 0 when the proxy runs, 3 when it does not."""
)
@json_option
def status(as_json: bool) -> None:
    """Say whether the proxy runs."""
    states = unit_states((SERVICE, SOCKET, "aa-redirect.service"))
    running = states[SERVICE] == "active"
    if as_json:
        print_json({"running": running, "units": states})
    else:
        click.echo("running" if running else "not running")
        print_table(("unit", "state"), states.items())
    if not running:
        click.get_current_context().exit(NOT_RUNNING)


@proxy.command(
    epilog="""\b
Examples:
  aasm proxy logs
  aasm proxy logs -f"""
)
@click.option("-n", "--lines", default=50, show_default=True, help="How many lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines.")
def logs(lines: int, follow: bool) -> None:
    """Show what the proxy and the redirect log."""
    command = ["journalctl", "-u", SERVICE, "-u", "aa-redirect.service", "-n", str(lines)]
    os.execvp(command[0], [*command, "-f"] if follow else command)


proxy.add_command(install_ca)
proxy.add_command(uninstall_ca)
