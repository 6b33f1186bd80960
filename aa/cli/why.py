"""`aasm why`: the reasons, for the one who was refused. A TLS alert carries no text; this does."""

from __future__ import annotations

import time
from typing import Any

import click

from aa.cli.errors import Failure, connected, control
from aa.cli.output import cell, console, json_option, print_json, print_table
from aa.cli.runs import print_denials
from aa.paths import RUN_GATEWAY_SOCKET


@click.command(
    epilog="""\b
Examples:
  aasm why                 inside a run: what was refused, by which rule, what to do
  aasm why k3v9x2mq        as an operator: the same for that run
  aasm why --json

Exits with 1 when something was refused, 0 when nothing was."""
)
@click.argument("run", required=False)
@json_option
def why(run: str | None, as_json: bool) -> None:
    """Say what was refused lately, and what to do about it."""
    if run is None:
        if not RUN_GATEWAY_SOCKET.exists():
            raise Failure(
                "this is not inside a governed run",
                hint="name one: `aasm runs list`, then `aasm why RUN`",
            )
        with connected(RUN_GATEWAY_SOCKET) as client:
            told = client.call("io.agentassembly.Gateway.GetInfo")
    else:
        with control() as client:
            told = client.call("io.agentassembly.Control.GetRun", {"run": run})
    if as_json:
        print_json(told)
    else:
        if run is None:
            console().print(
                f"run {told['run']}, agent {told['agent']}, user {told['user']}, "
                f"layers {' '.join(told['layers'])}, mode {told['mode']}, policy {told['policy']}"
            )
            for problem in told["problems"]:
                console().print("  problem:", cell(problem))
        _print_waiting(told.get("waiting", []))
        print_denials(told["denials"])
    if told["denials"]:
        click.get_current_context().exit(1)


def _print_waiting(waiting: list[dict[str, Any]]) -> None:
    print_table(
        ("approval", "what", "target", "rule", "left"),
        [
            (
                w["approval"],
                w["kind"],
                w["target"],
                w["rule"],
                f"{max(0, int(w['expires'] - time.time()))} s",
            )
            for w in waiting
        ],
        title="a person is asked about" if waiting else "",
    )
