"""aa-redirect: brings the rules into force and watches them; `--remove` takes them out for good."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aa import config
from aa.cgroup import NoUnifiedCgroup
from aa.daemon import CannotStart, Daemon, serve
from aa.model import Layer, Run, RunState
from aa.redirect import iptables
from aa.redirect.iptables import Backend, CannotApply
from aa.redirect.ruleset import V4, V6, RuleSet, explicit_address
from aa.redirect.watch import CannotGuard, Guard, Watcher
from aa.report import Reporter, RunTable, Unreachable, confirm_run
from aa.tomlfile import InvalidFile
from aa.varlink import VarlinkError

COMPONENT = "redirect"

log = logging.getLogger("aa.redirect")


def rules_for(listen: config.Listen) -> RuleSet:
    """Raises ValueError where the configured ends cannot be redirected to."""
    return RuleSet(
        front_port=listen.front_port,
        explicit=explicit_address(listen.explicit_address),
        explicit_port=listen.explicit_port,
        dns_port=listen.dns_port,
    )


async def live(daemon: Daemon) -> None:
    try:
        settings = config.load()
        guard = Guard(rules_for(settings.listen), iptables.detect(), state_dir=_state_dir())
        await asyncio.to_thread(guard.start)
    except CannotGuard as e:
        raise CannotStart(str(e), hint=e.hint) from e
    except InvalidFile as e:
        raise CannotStart(str(e), hint="mend the file; rules that are in force stay") from e
    except (NoUnifiedCgroup, CannotApply, ValueError) as e:
        raise CannotStart(str(e)) from e
    with contextlib.closing(guard):
        await _watch(daemon, guard, settings.gateway.socket)


async def _watch(daemon: Daemon, guard: Guard, gateway: Path) -> None:
    reporter = Reporter(COMPONENT, socket=gateway)
    runs = RunTable(socket=gateway, on_run=lambda run: _on_run(watcher, run, gateway))
    watcher = Watcher(guard, reporter, lambda: list(runs), on_status=daemon.status)
    daemon.reload = lambda: _reload(watcher)
    problems = await watcher.check()  # the read-back
    if problems:
        raise CannotStart("; ".join(problems))
    daemon.ready(f"rules in force ({guard.backend.kind})")
    tasks = [
        asyncio.create_task(each)
        for each in (watcher.watch(), reporter.run(), runs.follow(), daemon.stop.wait())
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises what ended it
    finally:
        watching, sending, following, _ = tasks
        for task in (watching, following):
            task.cancel()
        await asyncio.gather(watching, following, return_exceptions=True)
        if reporter.connected:
            await reporter.close()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _on_run(watcher: Watcher, run: Run, gateway: Path) -> None:
    if run.state is RunState.ENDED:
        watcher.runs.ended(run)
    if run.state is not RunState.STARTING or Layer.PROXY not in run.layers:
        return
    reason = await watcher.why_not(run)
    if reason:
        log.warning("run %s is not confirmed: %s", run.id, reason)
    try:
        await confirm_run(run.id, COMPONENT, not reason, reason, socket=gateway)
    except (*Unreachable, VarlinkError) as e:
        log.warning("run %s: %s", run.id, e)  # unconfirmed, so it does not start


async def _reload(watcher: Watcher) -> None:
    """Rules for the configuration as it is now; whatever fails leaves the rules as they are."""
    try:
        await watcher.replace(rules_for(config.load().listen))
        log.info("reloaded")
    except (InvalidFile, ValueError, CannotApply) as e:
        log.error("not reloaded, the rules stay as they were: %s", e)


def remove_all() -> int:
    """Takes our rules out of every backend that is installed. Returns the exit status."""
    try:
        used = iptables.detect()
    except CannotApply as e:
        print(f"aa-redirect: {e}", file=sys.stderr)
        return 1
    failed = 0
    for backend in [used, *iptables.others(used)]:
        failed += _remove_from(backend)
    return 1 if failed else 0


def _remove_from(backend: Backend) -> int:
    """Returns for how many families it failed."""
    failed = 0
    for family in (V4, V6):
        try:
            if iptables.in_use(backend, family) and iptables.remove(backend, family):
                print(f"aa-redirect: removed the {family.name} rules ({backend.kind})")
        except CannotApply as e:
            print(f"aa-redirect: {family.name} ({backend.kind}): {e}", file=sys.stderr)
            failed += 1
    return failed


def _state_dir() -> Path | None:
    """RuntimeDirectory= of the unit, which outlives the service."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(given) if given else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aa-redirect", description=__doc__)
    parser.add_argument("--remove", action="store_true", help="take every rule of ours out")
    options = parser.parse_args(arguments)
    return remove_all() if options.remove else serve(live)


if __name__ == "__main__":
    sys.exit(main())
