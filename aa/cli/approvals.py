"""`aasm approvals`: what waits for a person, and the person's answer."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from aa.audit.record import printable
from aa.cli.errors import Failure, control
from aa.cli.output import ago, cell, console, json_option, print_json, print_table

CONTROL = "io.agentassembly.Control"
ANSWER_SECONDS = 15.0
"""The gateway looks up the groups of whoever answers, and a user database may be slow."""


@click.group()
def approvals() -> None:
    """Answer what rules with effect = "ask" ask."""


@approvals.command(
    "list",
    epilog="""\b
Examples:
  aasm approvals list
  aasm approvals list --all --json""",
)
@click.option("--all", "closed", is_flag=True, help="Also those that are over, newest first.")
@json_option
def list_(closed: bool, as_json: bool) -> None:
    """List what waits for an answer, and what was approved and is not used yet."""
    with control() as client:
        found = client.call(f"{CONTROL}.ListApprovals", {"closed": closed})["approvals"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("id", "state", "run", "agent", "what", "target", "rule", "asked", "left", "for"),
        [
            (
                a["id"],
                a["state"],
                a["run"],
                a["agent"],
                a["kind"],
                a["target"],
                " ".join(a["rules"]),
                ago(a["created"]),
                left(a),
                whom(a),
            )
            for a in found
        ],
        empty="nothing waits for an answer",
    )


def left(approval: dict[str, Any]) -> str:
    """How long there is to answer, or to use the answer."""
    if approval["state"] == "approved" and approval["remember"]:
        return "the run"
    if approval["state"] not in ("pending", "approved"):
        return ""
    seconds = max(0, int(approval["expires"] - time.time()))
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min"


def whom(approval: dict[str, Any]) -> str:
    return ", and ".join(" or ".join(names) for names in approval["by"])


@approvals.command(
    epilog="""\b
Examples:
  aasm approvals show k3v9x2mq
  aasm approvals show k3v9x2mq --json"""
)
@click.argument("approval")
@json_option
def show(approval: str, as_json: bool) -> None:
    """Show one approval with everything that is known of its action."""
    with control() as client:
        told = client.call(f"{CONTROL}.GetApproval", {"id": approval})["approval"]
    if as_json:
        print_json(told)
    else:
        _print_one(told)


def _print_one(a: dict[str, Any]) -> None:
    counts = "for the rest of the run" if a["remember"] else "once"
    rows: list[tuple[str, Any]] = [
        ("approval", a["id"]),
        ("state", a["state"]),
        ("agent", a["agent"]),
        ("run", a["run"]),
        ("user", a["user"]),
        ("what", a["kind"]),
        ("target", a["target"]),
        ("asked by", " ".join(a["rules"])),
        ("reason", a["reason"]),
        ("policy", a["policy"]),
        ("for", whom(a)),
        ("counts", counts),
        ("asked", ago(a["created"])),
        ("left", left(a)),
        ("answered by", a["decided_by"]),
        ("note", a["note"]),
        ("digest", a["digest"]),
    ]
    print_table(("field", "value"), [row for row in rows if row[1] != ""])
    known = {k: v for k, v in a["attributes"].items() if k not in a["bound"]}
    _print_attributes("It is for exactly this:", a["bound"])
    _print_attributes("Also known, and not part of it:", known)


def _print_attributes(title: str, attributes: dict[str, Any]) -> None:
    if not attributes:
        return
    out = console()
    out.print()
    out.print(title)
    for line in json.dumps(attributes, indent=2, sort_keys=True).splitlines():
        out.print("  ", cell(line), sep="")


@approvals.command(
    epilog="""\b
Examples:
  aasm approvals approve k3v9x2mq
  aasm approvals approve k3v9x2mq --note "checked with Ann"

The action is decided once more when it goes on: a deny rule still denies it. Not possible from
inside a governed run. Exits with 4 when the rules name others for this."""
)
@click.argument("approval")
@click.option("--note", default="", help="Why, for the audit log.")
@json_option
def approve(approval: str, note: str, as_json: bool) -> None:
    """Let the action happen: once, or for the rest of the run where its rule says so."""
    _answer("Approve", approval, note, as_json)


@approvals.command(
    epilog="""\b
Examples:
  aasm approvals deny k3v9x2mq
  aasm approvals deny k3v9x2mq --note "not on a Friday"

The note is told to the agent. The same action is denied without asking again until the
approval would have expired."""
)
@click.argument("approval")
@click.option("--note", default="", help="Why, for the agent and the audit log.")
@json_option
def deny(approval: str, note: str, as_json: bool) -> None:
    """Deny the action."""
    _answer("Deny", approval, note, as_json)


def _answer(method: str, approval: str, note: str, as_json: bool) -> None:
    with control(timeout=ANSWER_SECONDS) as client:
        told = client.call(f"{CONTROL}.{method}", {"id": approval, "note": note})["approval"]
    if as_json:
        print_json(told)
        return
    what = printable(f"{told['kind']} {told['target']} of {told['agent']} [{told['run']}]")
    lasts = ", for the rest of the run" if told["remember"] and method == "Approve" else ""
    click.echo(f"{told['state']}: {what}{lasts}", err=True)


@approvals.command(
    epilog="""\b
Examples:
  aasm approvals watch
  aasm approvals watch --json | while read -r line; do notify-send "$line"; done

Begins with what waits already. With --json each change is one line."""
)
@json_option
def watch(as_json: bool) -> None:
    """Print each question as it is asked, and each answer as it is given."""
    with control(timeout=None) as client:
        try:
            for reply in client.stream(f"{CONTROL}.WatchApprovals"):
                _print_change(reply["approval"], as_json)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return
    raise Failure("the gateway ended the stream", hint="call it again to go on")


def _print_change(a: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(a))
        return
    state = click.style(f"{a['state']:<9}", fg="yellow" if a["state"] == "pending" else None)
    by = f" by {a['decided_by']}" if a["decided_by"] else ""
    what = f"{a['agent']} [{a['run']}]: {a['kind']} {a['target']} ({' '.join(a['rules'])})"
    click.echo(f"{a['id']} {state} {printable(what + by)}")
