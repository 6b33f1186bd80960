"""`aasm halt`: stops every run of this host, and lets them go on again."""

from __future__ import annotations

import click

from aa.cli.errors import NO, connected
from aa.paths import LAUNCH_SOCKET

HALT_SECONDS = 60.0
"""aa-launch freezes all runs at once, but a run that does not stand still has its deadline."""


@click.command(
    epilog="""\b
Examples:
  aasm halt --reason "looking into an incident"
  aasm halt --release

A halt survives restarts and reboots. Runs that somebody paused stay paused after it.
Exits with 1 when something is not as it should be: then it says what."""
)
@click.option("--release", is_flag=True, help="End the halt: runs go on, and may start again.")
@click.option("--reason", default="", help="Why, for everybody who meets the halt.")
def halt(release: bool, reason: str) -> None:
    """Stop everything: freeze all runs, deny all they ask, start none."""
    if release and reason:
        raise click.UsageError("--reason goes with a halt, not with its end")
    with connected(LAUNCH_SOCKET, timeout=HALT_SECONDS) as client:
        if release:
            told = client.call("io.agentassembly.Launch.Release")
            click.echo(f"the halt is over; {_count(told['resumed'])} on", err=True)
        else:
            told = client.call("io.agentassembly.Launch.Halt", {"reason": reason})
            click.echo(f"this host is halted; {_count(told['frozen'])} no further", err=True)
            if told["killed"]:
                click.echo(f"killed, for they did not stop: {' '.join(told['killed'])}", err=True)
    for problem in told["problems"]:
        click.echo(f"problem: {problem}", err=True)
    if told["problems"]:
        click.get_current_context().exit(NO)


def _count(runs: list[str]) -> str:
    return f"{len(runs)} run{' goes' if len(runs) == 1 else 's go'}"
