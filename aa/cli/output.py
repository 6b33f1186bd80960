"""How `aasm` shows things: tables on a terminal, JSON for programs, nothing that can move a cursor."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aa.audit.record import printable

F = TypeVar("F", bound=Callable[..., Any])

COLOURS = {
    "allow": "green",
    "deny": "red",
    "ask": "yellow",
    "ok": "green",
    "running": "green",
    "active": "green",
    "degraded": "yellow",
    "none": "red",
    "failed": "red",
    "inactive": "yellow",
    "paused": "yellow",
    "pending": "yellow",
    "approved": "green",
    "denied": "red",
    "gap": "red",
    "alert": "red",
    "error": "red",
    "warning": "yellow",
}


def json_option(function: F) -> F:
    """Adds `--json` as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(
        function
    )


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=True))


def cell(value: Any) -> Text:
    """Untrusted text, safe for a terminal, coloured when it is one of the known words."""
    text = printable(str(value))
    return Text(text, style=COLOURS.get(text, ""))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", empty: str = ""
) -> None:
    listed = list(rows)
    if not listed:
        if empty:
            click.echo(empty, err=True)
        return
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=n == 0)
    for row in listed:
        table.add_row(*(cell(v) for v in row))
    console().print(table)


def console() -> Console:
    """Wide enough for scripts: a pipe is no 80-column terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def ago(seconds: float) -> str:
    """A moment (seconds since the epoch) as people say it."""
    if not seconds:
        return "-"
    past = max(0, int(time.time() - seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if past >= size:
            return f"{past // size} {unit} ago"
    return f"{past} s ago"
