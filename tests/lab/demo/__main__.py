"""`make demo`: boots, installs, runs the sample agent, and prints what became of each attempt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import measures
from tests.lab.demo.run import AGENT, Outcome, Story, attempt_all, configure, start, tell_story
from tests.lab.harness import Container, LabError, names
from tests.lab.harness.__main__ import HERE as DEBIAN
from tests.lab.harness.__main__ import newest_debs

WIDTH = 190  # columns where the output is no terminal
AGENT_SAW = 36  # columns
ENTRY = 130  # characters shown of a record
DAEMON_LOGS = [f"--unit={daemon}" for daemon in measures.DAEMONS]
COLOURS = {"allow": "green", "deny": "red"}

console = Console() if sys.stdout.isatty() else Console(width=WIDTH)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Shows what goes on, and how long it took."""
    begun = time.monotonic()
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        yield
    console.print(f"[dim]{time.monotonic() - begun:6.1f} s[/]  {title}", highlight=False)


def attempts_table(outcomes: list[Outcome]) -> Table:
    table = Table(
        title="What the governed agent tried, and what became of it", title_justify="left"
    )
    for column in ("attempt", "decision", "rule"):
        table.add_column(column, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("the agent saw", max_width=AGENT_SAW, no_wrap=True)
    table.add_column("origin", no_wrap=True)
    table.add_column("journal (AA_SEQ: message)", overflow="fold", ratio=1)
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        record = outcome.record or {}
        decision = record.get("AA_DECISION", "deny" if not outcome.succeeded else "none")
        seen = "reached" if outcome.reached_origin else "saw nothing"
        table.add_row(
            outcome.attempt.title,
            Text(decision, style=COLOURS.get(decision, "")),
            Text(record.get("AA_RULE", "" if outcome.attempt.target else "sandbox")),
            f"{1000 * outcome.seconds:.0f} ms",
            Text(outcome.said),
            seen if outcome.attempt.seen else "",
            Text(journal_entry(outcome)),
            Text("ok", style="green")
            if outcome.as_expected
            else Text("UNEXPECTED", style="bold red"),
        )
    return table


def journal_entry(outcome: Outcome) -> str:
    """The record's number and the beginning of its message, without the agent's name: all have it."""
    if outcome.record:
        entry = f"{outcome.record['AA_SEQ']}: {outcome.record['MESSAGE'].partition(': ')[2]}"
        return entry if len(entry) <= ENTRY else entry[: ENTRY - 1] + "…"
    return "NO RECORD" if outcome.attempt.target else "none: the sandbox refuses it in the kernel"


def told(story: Story) -> Iterator[Text]:
    """What the kernel layer saw inside TLS that nobody decrypted, and the timeline."""
    yield Text(
        f"\nWhat the kernel layer saw at the TLS library: {names.API} is not decrypted", "italic"
    )
    for record in story.seen:
        yield Text(f"  {record['AA_SEQ']}: {record['MESSAGE'].partition(': ')[2]}")
    if not story.seen:
        yield Text("  NO RECORD", style="bold red")
    yield Text(
        f"\naasm runs show {story.run} --timeline, from where its program begins", style="italic"
    )
    head, *rows = story.timeline.splitlines()
    begins = next((n for n, row in enumerate(rows) if "/usr/bin/sh -c" in row), 0)
    yield Text("\n".join([head, *rows[begins:]]), no_wrap=True, overflow="ellipsis")


def measures_table(found: list[measures.Measure]) -> Table:
    table = Table(title="What it costs here (not asserted)", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("how", style="dim")
    for measure in found:
        table.add_row(measure.name, measure.value, measure.how)
    return table


def measure_all(box: Container) -> list[measures.Measure]:
    measures.prepare(box)
    return [
        *measures.connections(box, agent=AGENT),
        *measures.memory(box),
        *measures.starts(box, agent=AGENT),
    ]


def play(box: Container) -> bool:
    with step("installing the packages with apt"):
        box.install_deb(*newest_debs(engine=DEBIAN))
        configure(box)
    with step("systemctl start aa-proxy"):
        start(box)
    with step("aasm run: the sample agent makes its attempts"):
        outcomes = attempt_all(box)
    with step("aasm run: a shell that writes, fetches and removes"):
        story = tell_story(box)
    with step("measuring"):
        found = measure_all(box)
    for part in (attempts_table(outcomes), *told(story), measures_table(found)):
        console.print(part)
    surprises = sum(not outcome.as_expected for outcome in outcomes) + (not story.seen)
    console.print(
        f"{len(outcomes)} attempts and a story; {surprises} surprises. "
        "Nothing of this is left on the machine but Debian packages."
    )
    return surprises == 0


def main() -> int:
    with ExitStack() as scene:
        with step("booting a container with a real systemd, and the origins beside it"):
            box = scene.enter_context(Container("demo"))
        try:
            return 0 if play(box) else 1
        except LabError as problem:
            console.print(Text(str(problem), style="red"))
            console.print(
                Text(box.raw(["journalctl", "--no-pager", "--lines=80", *DAEMON_LOGS]).out)
            )
            return 1


if __name__ == "__main__":
    sys.exit(main())
