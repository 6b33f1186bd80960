"""`aasm audit`: reading the audit log through the gateway, which alone may read the file."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from aa.audit.record import sentence
from aa.cli.errors import Failure, control
from aa.cli.output import COLOURS, json_option
from aa.model import Effect, Kind, RecordType


@click.group()
def audit() -> None:
    """Read the audit log."""


@audit.command(
    epilog="""\b
Examples:
  aasm audit tail
  aasm audit tail -f --decision deny
  aasm audit tail -n 100 --run k3v9x2mq --json
  journalctl AA_DECISION=deny            the same records in the journal

With --json each record is one line."""
)
@click.option(
    "-n", "--lines", default=20, show_default=True, help="How many records to begin with."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with each new record.")
@click.option("--run", help="Only records of this run.")
@click.option("--agent", help="Only records of this agent.")
@click.option(
    "--decision", type=click.Choice([e.value for e in Effect]), help="Only these decisions."
)
@click.option(
    "--kind",
    type=click.Choice([k.value for k in Kind]),
    metavar="KIND",
    help="Only this kind of action, for example net.connect.",
)
@click.option(
    "--type",
    "type_",
    type=click.Choice([t.value for t in RecordType]),
    metavar="TYPE",
    help="Only decision, refusal, observed, lifecycle, gap or alert.",
)
@json_option
def tail(lines: int, follow: bool, type_: str | None, as_json: bool, **filters: str | None) -> None:
    """Show the newest records."""
    fields = {k: v for k, v in {**filters, "type": type_}.items() if v}
    parameters = {"lines": lines, "follow": follow, "fields": fields}
    with control(timeout=None if follow else 10.0) as client:
        try:
            for reply in client.stream("io.agentassembly.Control.TailAudit", parameters):
                for record in reply["records"]:
                    _print(record, as_json)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return
    if follow:
        raise Failure("the gateway ended the stream", hint="call it again to go on")


def _print(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(record))
        return
    colour = COLOURS.get(record["decision"]) or COLOURS.get(record["type"])
    click.echo(f"{record['time'][:23]} " + click.style(sentence(record), fg=colour))
