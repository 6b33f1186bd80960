"""`aasm status`: is this host guarded, by which policy, how far down, and what is not well."""

from __future__ import annotations

from typing import Any

import click

from aa.cli.errors import NOT_RUNNING, Failure, control
from aa.cli.output import ago, cell, console, json_option, print_json, print_table
from aa.cli.units import UNITS, unit_states


@click.command(
    epilog="""\b
Examples:
  aasm status
  aasm status --json | jq .policy_state

Exits with 0 when the policy is in force as written and every daemon runs, 1 when something
is degraded, 3 when the gateway does not answer."""
)
@json_option
def status(as_json: bool) -> None:
    """Show whether this host is guarded, and by what."""
    states = unit_states(UNITS)
    try:
        with control() as client:
            told = client.call("io.agentassembly.Control.GetStatus")
    except Failure as e:
        if as_json or e.exit_code != NOT_RUNNING:
            raise
        _print_units(states)
        raise
    told["units"] = states
    if as_json:
        print_json(told)
    else:
        _print(told)
    down = [u for u, s in states.items() if s != "active"]
    if told["policy_state"] != "ok" or told["problems"] or told["halted"] or down:
        click.get_current_context().exit(1)


def _print(told: dict[str, Any]) -> None:
    out = console()
    _print_units(told["units"])
    out.print()
    if told["halted"]:
        out.print(cell(told["halted"]), style="bold red")
    out.print("policy    ", cell(told["policy_state"]), cell(told["policy"]), sep=" ")
    for component in told["components"]:
        details = ", ".join(
            f"{k} {v}" for k, v in component["details"].items() if v not in ("", [])
        )
        out.print(
            f"{component['name']:<10}", cell(component["state"]), cell(f"({details})"), sep=" "
        )
    out.print(
        f"runs       {told['runs']} live; since {ago(told['started'])}: "
        f"{told['decisions']} decisions, {told['denials']} denials, {told['records']} records, "
        f"{told['gaps']} gaps"
    )
    if told["pending"]:
        out.print(
            "pending   ",
            cell(
                f"{len(told['pending'])} runs have the sandbox of an earlier policy until they are "
                f"started again: {', '.join(told['pending'])}"
            ),
            sep=" ",
        )
    if told["policy_state"] == "none":
        out.print(
            "\nNo policy is in force, so everything is denied. Choose one: "
            "aasm policy use observe|coding-agent|locked-down",
            style="bold",
        )
    print_table(
        ("problem", "what to do"),
        [
            (f"{p['file']}:{p['line']}: {p['key']}: {p['message']}".strip(": "), p["fix"])
            for p in told["problems"]
        ],
    )


def _print_units(states: dict[str, str]) -> None:
    print_table(("unit", "state"), states.items())
