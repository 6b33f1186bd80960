"""`aasm runs`: the runs that live and those that ended."""

from __future__ import annotations

from typing import Any

import click

from aa.cli.errors import connected, control
from aa.cli.output import ago, json_option, print_json, print_table
from aa.paths import LAUNCH_SOCKET


@click.group()
def runs() -> None:
    """List, show and end runs."""


@runs.command(
    "list",
    epilog="""\b
Examples:
  aasm runs list
  aasm runs list --ended --json""",
)
@click.option("--ended", is_flag=True, help="Also list runs that are over, newest first.")
@json_option
def list_(ended: bool, as_json: bool) -> None:
    """List live runs."""
    with control() as client:
        found = client.call("io.agentassembly.Control.ListRuns", {"ended": ended})["runs"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("run", "agent", "user", "state", "layers", "started", "end", "command"),
        [
            (
                r["id"],
                r["agent"],
                r["user"],
                r["state"],
                " ".join(r["layers"]),
                ago(r["started"]),
                end_of(r),
                " ".join(r["argv"]),
            )
            for r in found
        ],
        empty="no runs",
    )


def end_of(run: dict[str, Any]) -> str:
    """How a run ended, in a word."""
    if run["state"] != "ended":
        return ""
    if run["signal"]:
        return f"signal {run['signal']}"
    return f"exit {run['exit_code']}" if run["exit_code"] is not None else "unknown"


@runs.command(
    epilog="""\b
Examples:
  aasm runs show k3v9x2mq
  aasm runs show k3v9x2mq --json"""
)
@click.argument("run")
@json_option
def show(run: str, as_json: bool) -> None:
    """Show one run and what it was refused."""
    with control() as client:
        told = client.call("io.agentassembly.Control.GetRun", {"run": run})
    if as_json:
        print_json(told)
        return
    print_table(("field", "value"), [(k, v) for k, v in told["run"].items() if v not in ("", None)])
    print_denials(told["denials"])


def print_denials(denials: list[dict[str, Any]]) -> None:
    print_table(
        ("time", "layer", "what", "target", "times", "rule", "reason"),
        [
            (
                d["time"][11:19],
                d["layer"],
                d["kind"],
                d["target"],
                d["count"],
                d["rule"],
                d["reason"],
            )
            for d in denials
        ],
        empty="nothing was refused",
    )


@runs.command(
    epilog="""\b
Examples:
  aasm runs kill k3v9x2mq"""
)
@click.argument("run")
def kill(run: str) -> None:
    """End every process of a run, now."""
    with connected(LAUNCH_SOCKET) as client:
        client.call("io.agentassembly.Launch.Kill", {"run": run})
    click.echo(f"run {run} is ended", err=True)
