"""What `--help`, the README and the documents tell people to type is what `aasm` takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from aa.cli.main import COMMANDS, root

TOP = Path(__file__).parents[2]
TEXTS = [
    TOP / "README.md",
    *sorted((TOP / "docs").glob("*.md")),
    *sorted(TOP.glob("etc/**/README")),
]
LISTINGS = ("runs list", "runs show", "policy check", "policy show", "policy explain",
            "policy test", "policy diff", "policy learn",
            "approvals list", "approvals show", "approvals watch",
            "audit tail", "status", "why", "limits show", "runs tree", "proxy status", "ca show")  # fmt: skip
SHELL = {"|", "||", "&&", ";", "<", ">"}


def commands(group: click.Group = root, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by the words that call it."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        words = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from commands(command, words)
        else:
            yield words, command


ALL = dict(commands())


def typed(line: str) -> list[str]:
    """The words of an example up to its comment, or to what the shell takes."""
    line = re.split(r"\s{3,}|\s#\s", line)[0]
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    end = next((n for n, word in enumerate(words) if word in SHELL), len(words))
    return words[:end]


def accepts(words: list[str]) -> None:
    """Parses the words as `aasm` would, without doing anything. Raises click's UsageError."""
    command: click.Command = root
    rest = words
    while isinstance(command, click.Group):
        ctx = click.Context(command)
        found = command.get_command(ctx, rest[0]) if rest else None
        if found is None:
            raise click.UsageError(f"no command {' '.join(words)}")
        command, rest = found, rest[1:]
    command.make_context(words[0], list(rest))


def examples(text: str) -> list[list[str]]:
    """The lines that begin with `aasm`, after a prompt, `sudo` or nothing."""
    lines = re.findall(r"^\s*(?:[#$] )?(?:sudo )?aasm (.*)$", text, re.MULTILINE)
    return [typed(line) for line in lines]


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_examples_that_it_takes(name: str) -> None:
    block = (ALL[name].epilog or "").split("\n\n")[0]
    found = examples(block)
    assert "Examples:" in block and found
    for words in found:
        accepts(words)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(TOP)))
def test_every_command_in_a_document_is_one(path: Path) -> None:
    blocks = re.findall(r"^```(?:console)?\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    for words in examples("\n".join(blocks) if path.suffix == ".md" else path.read_text()):
        accepts(words)
    for words in re.findall(r"`(?:sudo )?aasm ([^`]+)`", path.read_text()):
        assert words.split()[0] in COMMANDS


@pytest.mark.parametrize("wrong", ["runs", "policy use", "audit tail --kind net", "proxy begin"])
def test_what_is_no_command_is_noticed(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        accepts(wrong.split())


@pytest.mark.parametrize("name", LISTINGS)
def test_what_is_listed_can_be_had_as_json(name: str) -> None:
    assert any("--json" in p.opts for p in ALL[name].params)
