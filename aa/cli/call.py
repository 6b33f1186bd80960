"""`aasm call`: any method of any service, as `varlinkctl call` does where systemd is new enough."""

from __future__ import annotations

import json
from pathlib import Path

import click

from aa import paths
from aa.cli.errors import Failure, connected
from aa.cli.output import print_json

ADDRESSES = {
    "io.agentassembly.Gateway": paths.RUN_GATEWAY_SOCKET,
    "io.agentassembly.Enforce": paths.ENFORCE_SOCKET,
    "io.agentassembly.Control": paths.CONTROL_SOCKET,
    "io.agentassembly.Launch": paths.LAUNCH_SOCKET,
}


@click.command(
    epilog="""\b
Examples:
  aasm call io.agentassembly.Control.GetStatus
  aasm call io.agentassembly.Control.ListRuns '{"ended": true}'
  aasm call --more io.agentassembly.Control.TailAudit '{"lines":1,"follow":true,"fields":{}}'
  aasm call --socket /run/agent-assembly/launch org.varlink.service.GetInfo

The reply is JSON on standard output. The definitions of the interfaces are in
/usr/share/agent-assembly/varlink."""
)
@click.argument("method")
@click.argument("parameters", default="{}")
@click.option("--socket", type=click.Path(path_type=Path), help="Where the service listens.")
@click.option("--more", is_flag=True, help="Ask for a stream of replies.")
def call(method: str, parameters: str, socket: Path | None, more: bool) -> None:
    """Call METHOD (its full name) with PARAMETERS (a JSON object)."""
    try:
        given = json.loads(parameters)
    except ValueError as e:
        raise Failure(f"PARAMETERS is not JSON: {e}", code=2) from e
    if not isinstance(given, dict):
        raise Failure("PARAMETERS is not a JSON object", code=2)
    address = socket or ADDRESSES.get(method.rpartition(".")[0])
    if address is None:
        raise Failure(
            f"no service is known for {method}", hint="name its socket with --socket", code=2
        )
    with connected(address, timeout=None if more else 30.0) as client:
        if more:
            for reply in client.stream(method, given):
                print_json(reply)
        else:
            print_json(client.call(method, given))
