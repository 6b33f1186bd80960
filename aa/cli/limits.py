"""`aasm limits`: how much of each limit is used, by whom, and when it begins anew."""

from __future__ import annotations

from typing import Any

import click

from aa.cli.errors import NO, control
from aa.cli.output import json_option, print_json, print_table


@click.group()
def limits() -> None:
    """Show how much of each limit is used."""


@limits.command(
    epilog="""\b
Examples:
  aasm limits show
  aasm limits show --json

Exits with 1 when what is used cannot be counted, or has no prices."""
)
@json_option
def show(as_json: bool) -> None:
    """List the limits of the policy in force, with what was used in the window of now."""
    with control() as client:
        told = client.call("io.agentassembly.Control.ShowLimits")
    if as_json:
        print_json(told)
    else:
        print_table(
            ("limit", "per", "whose", "what", "used", "of", "begins anew", "state"),
            [
                (
                    one["ref"],
                    one["per"],
                    one["subject"] or "-",
                    _what(one),
                    _amount(one["used"]),
                    _amount(one["most"]),
                    one["resets"],
                    "used up" if one["exhausted"] else "ok",
                )
                for one in told["limits"]
            ],
            empty="the policy has no limits",
        )
        for problem in told["problems"]:
            click.echo(f"problem: {problem}", err=True)
    if told["problems"]:
        click.get_current_context().exit(NO)


def _what(limit: dict[str, Any]) -> str:
    names = f" {' '.join(limit['names'])}" if limit["names"] else ""
    return f"{limit['measure']}{names}"


def _amount(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")
