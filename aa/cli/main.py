"""The root of `aasm`. Commands load when they are called, so that `aasm run` starts fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

import click

from aa import __version__
from aa.cli.errors import Failure

COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("aa.cli.run:run_command", "Start an agent as a governed run."),
    "status": ("aa.cli.status:status", "Show whether this host is guarded, and by what."),
    "runs": ("aa.cli.runs:runs", "List, show, pause and end runs."),
    "halt": ("aa.cli.halt:halt", "Stop everything: freeze all runs, and start none."),
    "why": ("aa.cli.why:why", "Say what was refused lately, and what to do about it."),
    "approvals": ("aa.cli.approvals:approvals", "Answer what rules ask a person about."),
    "policy": ("aa.cli.policy:policy", "Check, show, explain, choose and reload the policy."),
    "limits": ("aa.cli.limits:limits", "Show how much of each limit is used."),
    "audit": ("aa.cli.audit:audit", "Read the audit log."),
    "proxy": ("aa.cli.proxy:proxy", "Start, stop and look at the proxy."),
    "ca": ("aa.cli.ca:ca", "Show and renew this host's certificate authority."),
    "call": ("aa.cli.call:call", "Call a method of one of the services, as JSON."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported only when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  aasm run -- claude              start an agent, governed
  aasm why                        (inside a run) what was refused, and why
  aasm status                     is this host guarded?
  aasm policy use coding-agent    choose a policy to begin with
  aasm audit tail -f              watch decisions as they are made

Exit codes: 0 done; 1 no (a denial, an invalid policy, nothing found); 2 wrong usage;
3 not running; 4 not permitted; 125-127 and 128+N as in `aasm run --help`.""",
)
@click.version_option(__version__, prog_name="aasm")
def root() -> None:
    """Govern AI agents on this host: one policy, one log, enforced by the kernel."""


def main() -> None:
    """The entry point. Errors that a person can mend end in one line and a hint, not a traceback."""
    try:
        root.main(prog_name="aasm", standalone_mode=True)
    except Failure as e:
        e.show()
        sys.exit(e.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
