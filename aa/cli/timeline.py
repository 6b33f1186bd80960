"""The timeline of a run: each record of the audit log as one line that a person can follow.

What a run reports of itself is in the log too, so an attribute may be anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import click

from aa.cli.errors import control
from aa.cli.output import print_json, print_table
from aa.model import Effect, Kind, Layer, RecordType

SEARCH_SECONDS = 60.0
"""For a log of the largest size that one may be configured to have."""
MAX_CELL = 300
"""Characters of one cell; `--json` has it all."""

WORDS = {
    Kind.FILE_OPEN: "file",
    Kind.FILE_UNLINK: "remove",
    Kind.FILE_RENAME: "rename",
    Kind.NET_CONNECT: "connect",
    Kind.DNS_QUERY: "lookup",
    Kind.HTTP_REQUEST: "request",
    Kind.LLM_REQUEST: "model",
    Kind.TOOL_CALL: "tool",
    Kind.MCP_CALL: "mcp",
}
"""What a kind is called here; the others by their own names."""
PLAINTEXT = "plaintext"
"""A request that was seen inside TLS, at the library, whoever decided its connection."""

Record = dict[str, Any]


def show(run: str, kinds: Sequence[str], lines: int, *, as_json: bool) -> None:
    records: list[Record] = []
    cut = ""
    parameters = {"run": run, "kinds": list(kinds), "limit": lines}
    with control(timeout=SEARCH_SECONDS) as client:
        for reply in client.stream("io.agentassembly.Control.GetTimeline", parameters):
            records += reply["records"]
            cut = reply["cut"]
    if as_json:
        print_json({"run": run, "records": records, "cut": cut})
        return
    if cut:
        click.echo(f"{cut}; -n takes more, --kind fewer kinds", err=True)
    print_table(
        ("time", "layer", "what", "target", "outcome", "by", "about"),
        [row(record) for record in records],
        empty="nothing of this run is in the log",
    )


def row(record: Record) -> tuple[str, ...]:
    """A record as cells of text, not yet safe for a terminal."""
    return (
        str(record["time"])[11:23],
        str(record["layer"]),
        _what(record),
        _short(_target(record)),
        _outcome(record),
        _short(_by(record)),
        _short("; ".join(_about(record))),
    )


def _what(record: Record) -> str:
    if record["kind"] == Kind.HTTP_REQUEST and record["layer"] == Layer.KERNEL:
        return PLAINTEXT
    return WORDS.get(record["kind"], str(record["kind"]))


def _target(record: Record) -> str:
    about = _attributes(record)
    target = str(record["target"])
    if record["kind"] == Kind.HTTP_REQUEST and about.get("method") and "path" in about:
        where = target if "://" in target else f"{target} {about['path']}"
        return f"{about['method']} {where}"
    argv = about.get("argv")
    if record["kind"] == Kind.EXEC and isinstance(argv, list):
        rest = shlex.join(str(x) for x in argv[1:])
        return f"{target} {rest}".rstrip() + (" …" if about.get("argv_truncated") else "")
    if record["kind"] == Kind.FILE_RENAME and about.get("to"):
        return f"{target} -> {about['to']}"
    return target


def _outcome(record: Record) -> str:
    about = _attributes(record)
    if record["decision"]:
        would = record.get("would")
        differs = would and would != record["decision"]
        return f"{record['decision']} (would {would})" if differs else str(record["decision"])
    if record["type"] in (RecordType.ALERT, RecordType.GAP):
        return str(record["type"])
    if record["kind"] == Kind.EXIT:
        return str(about["signal"]) if about.get("signal") else f"exit {about.get('code')}"
    return str(about.get("error") or about.get("unmeasured") or "")


def _by(record: Record) -> str:
    """Who did it: the rule of a decision, the process of what was seen."""
    about = _attributes(record)
    if record["rule"]:
        return str(record["rule"])
    name = str(about.get("program") or about.get("comm") or "").rpartition("/")[2]
    if record["kind"] == Kind.EXEC:
        name = str(about.get("exe", "")).rpartition("/")[2]
    return f"{name}[{about['pid']}]" if about.get("pid") else name


def _about(record: Record) -> list[str]:
    about = _attributes(record)
    told = []
    if record["count"] > 1:
        told.append(f"{record['count']} times")
    if about.get("gathered"):
        told.append("many files")
    if record["kind"] == Kind.FILE_OPEN and about.get("access"):
        told.append(str(about["access"]))
    if about.get("of"):
        told.append(f"of {about['of']}")
    if about.get("directory"):
        told.append("a directory")
    if about.get("exact") is False:
        told.append("as asked for")
    if about.get("peer"):
        told.append(f"to {about['peer']}" + ("" if about.get("peer_exact") else " (inferred)"))
    if "bytes_out" in about or "bytes_in" in about:
        told.append(f"{about.get('bytes_out', 0)} bytes out, {about.get('bytes_in', 0)} in")
    if about.get("continued"):
        told.append("continued")
    if about.get("decided") is False:
        told.append("no decided connection explains it")
    if record["kind"] == Kind.EXIT and isinstance(seconds := about.get("seconds"), float):
        told.append(f"after {seconds:.3f} s")
    if record["reason"] and record["decision"] != Effect.ALLOW:
        told.append(str(record["reason"]))
    return told


def _attributes(record: Record) -> dict[str, Any]:
    about = record.get("attributes")
    return about if isinstance(about, dict) else {}


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
