"""The demo's scene: install, configure, run the sample agent, and match its attempts with their records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.lab.demo.attempts import ATTEMPTS, Attempt
from tests.lab.harness import Container, Origins, eventually, names
from tests.lab.trusting import await_signer

HERE = Path(__file__).resolve().parent
AGENT = "sample"
WORK = "/home/dev/work"

RUN_TIMEOUT = 300.0  # seconds for the whole agent
RECORDS_TIMEOUT = 10.0  # seconds until the reporters have handed over what they hold
QUIET = 1.0  # seconds without a new record that mean that there are no more
LATE = 0.04  # seconds by which the time of a record may lie outside its attempt
DECIDING = ("decision", "refusal")

Record = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One attempt: what the agent saw, its deciding record in the journal, and what reached the origins."""

    attempt: Attempt
    succeeded: bool
    said: str
    seconds: float
    record: Record | None
    reached_origin: bool

    @property
    def as_expected(self) -> bool:
        """Right effect on both ends, and a record with that decision where a layer decides."""
        wanted = "allow" if self.attempt.allowed else "deny"
        recorded = not self.attempt.target or (
            self.record is not None and self.record.get("AA_DECISION") == wanted
        )
        reached = not self.attempt.seen or self.reached_origin == self.attempt.allowed
        return self.succeeded == self.attempt.allowed and recorded and reached


def configure(box: Container) -> None:
    """Policy, agent file and work folder, as an operator would put them there."""
    box.push("/etc/agent-assembly/policy.d/50-demo.toml", (HERE / "policy.toml").read_text())
    box.push(f"/etc/agent-assembly/agents.d/{AGENT}.toml", (HERE / "agent.toml").read_text())
    box.run(["install", "-d", "-o", "dev", "-g", "dev", WORK]).check()
    attempts = json.dumps([a.command for a in ATTEMPTS])
    for name, content in (
        ("agent.py", (HERE / "agent.py").read_text()),
        ("attempts.json", attempts),
    ):
        box.push(f"{WORK}/{name}", content, owner="dev:dev")


def start(box: Container) -> None:
    """What an operator types. The proxy pulls in gateway, redirect and kernel layer."""
    box.systemctl("start", "aa-proxy", timeout=60).check()
    await_signer(box, names.INSPECTED)


FETCH = f"""
import time, urllib.request
for path in ("/hello", "/undecrypted"):
    urllib.request.urlopen("https://{names.API}" + path, timeout=8).read()
    time.sleep(1)
"""
"""The first request may come before the probes are in the new process, the second does not."""
STORY = f"""
date > note
/usr/bin/python3 -I -c '{FETCH}'
curl --silent https://{names.INSPECTED}/public/story
rm note
"""
STORY_KINDS = ("exec", "file.open", "file.unlink", "dns.query", "net.connect", "http.request")


@dataclass(frozen=True)
class Story:
    """A short run, what the kernel layer saw inside its untouched TLS, and the run's timeline."""

    run: str
    seen: list[Record]
    timeline: str


def tell_story(box: Container) -> Story:
    """One more run, of a shell; from it the request that was decrypted nowhere, and the timeline."""
    cursor = box.journal_cursor()
    box.run(
        ["aasm", "run", "--agent", AGENT, "--", "sh", "-c", STORY], user="dev", cwd=WORK
    ).check()
    records = _records(box, cursor)
    run = next(r["AA_RUN"] for r in records)
    seen = [
        r
        for r in records
        if (r["AA_KIND"], r["AA_LAYER"]) == ("http.request", "kernel")
        and names.API in r.get("AA_TARGET", "")
    ]
    kinds = [word for kind in STORY_KINDS for word in ("--kind", kind)]
    shown = box.run(
        ["aasm", "runs", "show", run, "--timeline", *kinds], user="dev", env={"COLUMNS": "400"}
    ).check()
    return Story(run, seen, shown.out)


def attempt_all(box: Container) -> list[Outcome]:
    """Runs the sample agent; one outcome for each attempt that it made."""
    cursor, mark = box.journal_cursor(), box.origins.mark()
    done = box.run(
        ["aasm", "run", "--agent", AGENT, "--", "/usr/bin/python3", "agent.py", "attempts.json"],
        user="dev",
        cwd=WORK,
        timeout=RUN_TIMEOUT,
    ).check()
    told = [json.loads(line) for line in done.out.splitlines()]
    records = _records(box, cursor)
    return [_outcome(ATTEMPTS[t["number"]], t, records, box.origins, mark) for t in told]


def _records(box: Container, cursor: str) -> list[Record]:
    """The agent's records since `cursor`, once its run is over and the reporters have no more."""
    before = -1

    def settled() -> list[Record]:
        nonlocal before
        found = box.journal(f"AA_AGENT={AGENT}", after=cursor)
        ended = any(r["AA_KIND"] == "run" and "ended" in r["MESSAGE"] for r in found)
        same, before = len(found) == before, len(found)
        return found if ended and same else []

    records: list[Record] = eventually(
        settled, timeout=RECORDS_TIMEOUT, every=QUIET, what="the run and its records end"
    )
    return records


def _outcome(
    attempt: Attempt, told: dict[str, Any], records: list[Record], origins: Origins, mark: int
) -> Outcome:
    begun, ended = told["begun"], told["ended"]
    events = [
        e for e in origins.since(mark, **attempt.seen) if begun - LATE <= e["time"] <= ended + LATE
    ]
    if attempt.seen.get("kind") in ("packet", "connection"):
        events = [e for e in events if e.get("port") != 53]  # the host's own resolver asks for it
    return Outcome(
        attempt,
        told["code"] == 0,
        told["said"],
        ended - begun,
        _record(attempt, begun, ended, records),
        bool(attempt.seen and events),
    )


def _record(attempt: Attempt, begun: float, ended: float, records: list[Record]) -> Record | None:
    """The record that decided: of those that name the target, the last one within the attempt's time."""
    found = [
        r
        for r in records
        if attempt.target
        and attempt.target == r.get("AA_TARGET")
        and r.get("AA_TYPE") in DECIDING
        and begun - LATE <= _time(r) <= ended + LATE
    ]
    wanted = "allow" if attempt.allowed else "deny"
    return next(
        (r for r in reversed(found) if r.get("AA_DECISION") == wanted), found[-1] if found else None
    )


def _time(record: Record) -> float:
    return datetime.fromisoformat(record["AA_TIME"]).timestamp()
