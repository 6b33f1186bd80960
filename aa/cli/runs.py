"""`aasm runs`: the runs that live and those that ended."""

from __future__ import annotations

from typing import Any

import click

from aa.cli import timeline
from aa.cli.errors import Failure, connected, control
from aa.cli.output import ago, json_option, print_json, print_table
from aa.model import Kind
from aa.paths import LAUNCH_SOCKET


@click.group()
def runs() -> None:
    """List, show, pause and end runs."""


@runs.command(
    "list",
    epilog="""\b
Examples:
  aasm runs list
  aasm runs list --ended --json

A run marked `pending` has the sandbox of an earlier policy: folders, closed files and programs, memory
and tasks follow when it is started again. What it connects to, resolves and calls is decided by the
policy in force.""",
)
@click.option("--ended", is_flag=True, help="Also list runs that are over, newest first.")
@json_option
def list_(ended: bool, as_json: bool) -> None:
    """List live runs."""
    with control() as client:
        told = client.call("io.agentassembly.Control.ListRuns", {"ended": ended})
    found, pending = told["runs"], set(told["pending"])
    if as_json:
        print_json([{**r, "pending": r["id"] in pending} for r in found])
        return
    print_table(
        ("run", "agent", "user", "state", "layers", "started", "end", "policy", "command"),
        [
            (
                r["id"],
                r["agent"],
                r["user"],
                state_of(r),
                " ".join(r["layers"]),
                ago(r["started"]),
                end_of(r),
                "pending" if r["id"] in pending else "",
                " ".join(r["argv"]),
            )
            for r in found
        ],
        empty="no runs",
    )


def state_of(run: dict[str, Any]) -> str:
    return "paused" if run["paused_by"] >= 0 else str(run["state"])


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
  aasm runs show k3v9x2mq --timeline
  aasm runs show k3v9x2mq --timeline --kind file.open --kind file.unlink
  aasm runs show k3v9x2mq --json"""
)
@click.argument("run")
@click.option(
    "--timeline",
    "with_timeline",
    is_flag=True,
    help="Show all that it did, in order: exec, files, connections, requests, plaintext.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([k.value for k in Kind]),
    metavar="KIND",
    help="Of the timeline only this kind, for example http.request; may be given again.",
)
@click.option(
    "-n",
    "--lines",
    default=1000,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="How many records of the timeline at most, the newest.",
)
@json_option
def show(run: str, with_timeline: bool, kinds: tuple[str, ...], lines: int, as_json: bool) -> None:
    """Show one run and what it was refused, or did.

    The timeline is in the audit log for as long as that is kept, also of runs that ended long ago.
    """
    if with_timeline:
        timeline.show(run, kinds, lines, as_json=as_json)
        return
    if kinds:
        raise Failure("--kind chooses from the timeline", hint="add --timeline")
    with control() as client:
        told = client.call("io.agentassembly.Control.GetRun", {"run": run})
    if as_json:
        print_json(told)
        return
    print_table(("field", "value"), [(k, v) for k, v in told["run"].items() if v not in ("", None)])
    if told["pending"]:
        click.echo("its sandbox is that of an earlier policy until it is started again", err=True)
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


@runs.command(
    epilog="""\b
Examples:
  aasm runs pause k3v9x2mq"""
)
@click.argument("run")
def pause(run: str) -> None:
    """Freeze every process of a run. It keeps its files and connections, and does nothing."""
    with connected(LAUNCH_SOCKET) as client:
        client.call("io.agentassembly.Launch.Pause", {"run": run})
    click.echo(f"run {run} is paused; `aasm runs resume {run}` lets it go on", err=True)


@runs.command(
    epilog="""\b
Examples:
  aasm runs resume k3v9x2mq

What an operator paused, only an operator resumes."""
)
@click.argument("run")
def resume(run: str) -> None:
    """Let a paused run go on."""
    with connected(LAUNCH_SOCKET) as client:
        client.call("io.agentassembly.Launch.Resume", {"run": run})
    click.echo(f"run {run} goes on", err=True)


@runs.command(
    epilog="""\b
Examples:
  aasm runs tree k3v9x2mq
  aasm runs tree k3v9x2mq --json"""
)
@click.argument("run")
@json_option
def tree(run: str, as_json: bool) -> None:
    """Show the processes of a run, as a tree."""
    with connected(LAUNCH_SOCKET) as client:
        told = client.call("io.agentassembly.Launch.Tree", {"run": run})
    if as_json:
        print_json(told)
        return
    print_table(
        ("process", "state", "user", "started", "cpu", "memory"),
        [
            (
                f"{'  ' * depth}{p['pid']} {' '.join(p['command'])}",
                p["state"],
                p["user"],
                ago(p["started"]),
                f"{p['cpu_seconds']:.1f} s",
                f"{p['memory'] / (1 << 20):.1f} MB",
            )
            for depth, p in with_depth(told["processes"])
        ],
        empty="no processes",
    )
    if not told["complete"]:
        click.echo("there are more processes than these", err=True)


def with_depth(processes: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Each process with the number of its ancestors in the list; parents come first in it."""
    depths: dict[int, int] = {}
    for process in processes:
        depths[process["pid"]] = depths.get(process["parent"], -1) + 1
    return [(depths[p["pid"]], p) for p in processes]
