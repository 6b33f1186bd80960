"""`aasm proxy`: the proxy and what it needs, as one thing to start, stop and look at."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import click

from aa.cli.ca import install_ca, uninstall_ca
from aa.cli.errors import NOT_PERMITTED, NOT_RUNNING, Failure
from aa.cli.output import json_option, print_json, print_table
from aa.cli.units import systemctl, unit_states
from aa.paths import DNS_PORT, ENFORCE_SOCKET, EXPLICIT_PORT, FRONT_PORT

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

The same as `systemctl start aa-proxy`, which also starts the gateway, the redirect and
the kernel layer. --listen and --gateway make a runtime drop-in below /run/systemd/system
that is gone after a reboot; without them, an earlier one is removed. The rules of the
redirect and the kernel's guard are rendered again for the new place."""
)
@click.option(
    "--listen", metavar="ADDRESS:PORT", help="Where the explicit proxy listens (loopback)."
)
@click.option(
    "--gateway",
    type=click.Path(path_type=Path),
    help="The gateway's enforce socket that the proxy asks.",
)
def start(listen: str | None, gateway: Path | None) -> None:
    """Start the proxy and everything it needs."""
    address = _loopback(listen) if listen else None
    changed = _write_drop_ins(address, gateway)
    if changed:
        systemctl("daemon-reload")
        systemctl("stop", SERVICE, SOCKET)
        systemctl("start", SOCKET)
        systemctl("restart", *READERS)
    systemctl("start", SERVICE)
    click.echo(f"{SERVICE} is running", err=True)


def _loopback(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        number = int(port)
    except ValueError:
        raise Failure(f"--listen {listen}: not ADDRESS:PORT", code=2) from None
    if not address.is_loopback or address.version != 4:
        raise Failure(
            f"--listen {listen}: only IPv4 loopback; the proxy knows its clients as local sockets",
            code=2,
        )
    if not 0 < number < 65536 or number in (FRONT_PORT, DNS_PORT):
        raise Failure(f"--listen {listen}: port {port} cannot be used", code=2)
    return f"{address}:{number}"


def _write_drop_ins(listen: str | None, gateway: Path | None) -> bool:
    """Makes the drop-ins say this and no more. Returns True when anything changed."""
    environment = ""
    if listen:
        environment += f"Environment=AA_LISTEN={listen}\n"
    if gateway and gateway != ENFORCE_SOCKET:
        environment += f"Environment=AA_GATEWAY={gateway}\n"
    wanted = {unit: f"[Service]\n{environment}" if environment else "" for unit in READERS}
    wanted[SOCKET] = _socket_drop_in(listen) if listen else ""
    changed = False
    for unit, text in wanted.items():
        changed |= _put(RUNTIME_UNITS / f"{unit}.d" / DROP_IN, text)
    return changed


def _socket_drop_in(listen: str) -> str:
    return "\n".join(
        [
            "[Socket]",
            "ListenStream=",
            "ListenDatagram=",
            *(f"ListenStream={a}:{FRONT_PORT}" for a in ("127.0.0.1", "[::1]")),
            f"ListenStream={listen}",
            *(
                f"{k}={a}:{DNS_PORT}"
                for k in ("ListenStream", "ListenDatagram")
                for a in ("127.0.0.1", "[::1]")
            ),
            "",
        ]
    )


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
        print_json({"running": running, "explicit_port": EXPLICIT_PORT, "units": states})
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
