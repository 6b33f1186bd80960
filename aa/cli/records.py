"""Records for commands that read the log as a whole: from a file, or through the gateway."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from aa.audit.file import read_forwards
from aa.audit.record import Record
from aa.cli.errors import Failure, control
from aa.paths import AUDIT_FILE

FROM_GATEWAY = 10_000
"""Records that the gateway hands out at once, the newest."""


def log_option(function: Any) -> Any:
    """Adds `--log` as the argument `log`."""
    return click.option(
        "--log",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Read this audit.jsonl, and the older files beside it, instead of the host's.",
    )(function)


def records(log: Path | None) -> Iterator[Record | None]:
    """Oldest first; None for a line that is no record.

    Without `log` the host's own file, or what the gateway hands out to who may not read that.
    """
    path = log or AUDIT_FILE
    if log is not None or os.access(path, os.R_OK):
        if not path.is_file():
            raise Failure(f"{path} is no file", hint="name an audit.jsonl")
        try:
            yield from read_forwards(path)
        except OSError as e:
            raise Failure(f"{path}: {e.strerror}", hint="name a readable file") from e
        return
    count = 0
    parameters = {"lines": FROM_GATEWAY, "follow": False, "fields": {}}
    with control(timeout=30.0) as client:
        for reply in client.stream("io.agentassembly.Control.TailAudit", parameters):
            count += len(reply["records"])
            yield from reply["records"]
    if count >= FROM_GATEWAY:
        click.echo(
            f"only the newest {FROM_GATEWAY} records were looked at; root reads the whole log",
            err=True,
        )
