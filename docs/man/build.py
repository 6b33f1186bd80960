"""Writes the man pages of `aasm` and its commands from their own help: build.py OUTPUT_DIRECTORY.

One page per command of the root and one for the root; the commands of a group are sections of the
group's page. So a page cannot say anything that `--help` does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from aa import __version__
from aa.cli.main import COMMANDS, root


def escaped(text: str) -> str:
    """Text that roff takes as it is: no requests, no escapes, no clever hyphens."""
    lines = []
    for line in text.splitlines():
        line = line.replace("\\", "\\e").replace("-", "\\-")
        lines.append("\\&" + line if line[:1] in (".", "'") else line)
    return "\n".join(lines)


def section(title: str, body: str) -> str:
    return f".SH {title}\n{body}\n"


def options(command: click.Command, ctx: click.Context) -> str:
    out = ""
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record:
            out += f".TP\n.B {escaped(record[0])}\n{escaped(record[1])}\n"
    return out


def examples(command: click.Command) -> str:
    text = (command.epilog or "").replace("\b\n", "")
    return f".nf\n{escaped(text)}\n.fi" if text else ""


def page(name: str, command: click.Command) -> str:
    ctx = click.Context(command, info_name=name.replace("-", " "))
    about = (command.help or "").strip()
    out = f'.TH {name.upper()} 1 "" "agent\\-assembly {__version__}" "Agent Assembly"\n'
    out += section("NAME", f"{escaped(name)} \\- {escaped(about.splitlines()[0].rstrip('.'))}")
    out += section("SYNOPSIS", f".B {escaped(command.get_usage(ctx).removeprefix('Usage: '))}")
    out += section("DESCRIPTION", escaped(about))
    out += section("OPTIONS", options(command, ctx))
    if name == "aasm":
        listed = "".join(
            f".TP\n.BR aasm\\-{n} (1)\n{escaped(text)}\n" for n, (_, text) in COMMANDS.items()
        )
        out += section("COMMANDS", listed)
    elif isinstance(command, click.Group):
        for sub in command.list_commands(ctx):
            inner = command.get_command(ctx, sub)
            assert inner is not None
            inside = click.Context(inner, info_name=f"{name.replace('-', ' ')} {sub}")
            usage = escaped(inner.get_usage(inside).removeprefix("Usage: "))
            out += f".SS {escaped(sub)}\n.B {usage}\n.PP\n{escaped((inner.help or '').strip())}\n"
            out += options(inner, inside) + ".PP\n" + examples(inner) + "\n"
    if examples(command):
        out += section("EXAMPLES AND EXIT CODES", examples(command))
    return out + section("SEE ALSO", ".BR aasm (1),\n.BR journalctl (1),\n.BR systemctl (1)")


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "aasm.1").write_text(page("aasm", root))
    for name in COMMANDS:
        command = root.get_command(click.Context(root), name)
        assert command is not None
        (directory / f"aasm-{name}.1").write_text(page(f"aasm-{name}", command))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
