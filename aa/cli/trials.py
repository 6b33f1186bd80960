"""`aasm policy test`, `diff` and `learn`: a policy tried on questions, and on what agents really did."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aa.cli.errors import Failure
from aa.cli.output import json_option, print_json, print_table
from aa.cli.records import log_option, records
from aa.paths import POLICY_DIR

if TYPE_CHECKING:
    from aa.audit.record import Record
    from aa.policy import Policy

PROPOSAL_MODE = 0o600
"""A proposal names hosts and files of somebody's work."""


def loaded(path: Path) -> Policy:
    """A policy for a command; what is wrong with it becomes a `Failure`."""
    from aa.policy import load
    from aa.tomlfile import InvalidFile

    if not path.exists():
        raise Failure(f"{path} does not exist", hint="name a policy file or a folder of them")
    try:
        return load(path)
    except InvalidFile as e:
        more = f" (and {len(e.problems) - 1} more)" if len(e.problems) > 1 else ""
        hint = f"see `aasm policy check {path}`"
        raise Failure(f"{e.problems[0]}{more}", hint=hint) from e
    except OSError as e:
        raise Failure(str(e), hint="name a readable policy file or a folder of them") from e


# -- test --------------------------------------------------------------------------------------


@click.command(
    epilog="""\b
Examples:
  aasm policy test cases.toml                          the policy is in the file itself
  aasm policy test --files ./my-policy.d cases.toml    cases for a policy of yours
  aasm policy test --json vectors/*.toml

A file has one [[case]] for each question: a name, the action, perhaps the run, and what is expected.
  [[case]]
  name   = "pushing to our forge is allowed"
  run    = { agent = "codex" }
  action = { kind = "net.connect", target = "forge.example:443" }
  expect = { effect = "allow", rule = "coding/forge" }

Exits with 0 when every answer is as expected, 1 when one is not or a file is not fit to be used."""
)
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option(
    "--files",
    "policy_files",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Ask this policy, a file or a folder, instead of the one in each FILE.",
)
@json_option
def test(files: tuple[Path, ...], policy_files: Path | None, as_json: bool) -> None:
    """Ask a policy questions whose answers are known."""
    given = loaded(policy_files) if policy_files else None
    told = [_tried(path, given) for path in files]
    if as_json:
        print_json({"files": told})
    else:
        _print_test(told)
    if not all(case["passed"] for file in told for case in file["cases"]):
        click.get_current_context().exit(1)


def _tried(path: Path, given: Policy | None) -> dict[str, Any]:
    from aa.policy import vectors
    from aa.tomlfile import InvalidFile

    try:
        found = vectors.vectors(path.read_bytes(), file=str(path))
    except InvalidFile as e:
        raise Failure(str(e.problems[0]), hint="see the format in `aasm policy test --help`") from e
    except OSError as e:
        raise Failure(f"{path}: {e.strerror}", hint="name a readable file of cases") from e
    policy = given or found.policy
    if policy is None:
        raise Failure(f"{path} has no [files]", hint="name the policy that it is about by --files")
    return {
        "file": str(path),
        "policy": policy.revision,
        "cases": [
            {
                "name": outcome.case.name,
                "line": outcome.case.line,
                "passed": outcome.passed,
                "differences": {
                    key: {"expected": expected, "found": found}
                    for key, (expected, found) in outcome.differences.items()
                },
                "decision": outcome.decision.as_json(),
            }
            for outcome in vectors.run(found, policy)
        ],
    }


def _print_test(told: list[dict[str, Any]]) -> None:
    failed = [(file, case) for file in told for case in file["cases"] if not case["passed"]]
    print_table(
        ("case", "name", "expected", "found"),
        [
            (
                f"{file['file']}:{case['line']}",
                case["name"],
                ", ".join(f"{k} {v['expected']}" for k, v in case["differences"].items()),
                ", ".join(f"{k} {v['found']}" for k, v in case["differences"].items()),
            )
            for file, case in failed
        ],
    )
    total = sum(len(file["cases"]) for file in told)
    click.echo(f"{total} cases, {len(failed)} answered otherwise than expected", err=True)


# -- diff --------------------------------------------------------------------------------------


@click.command(
    epilog="""\b
Examples:
  aasm policy diff /etc/agent-assembly/policy.d ./new.d     what a change would have done
  aasm policy diff old.toml new.toml --log /srv/audit.jsonl --json

Every act in the log is asked of both policies, with the run, the attributes and the moment that
the record has. A change `opens` when the new policy is more lenient, and `closes` when it is
stricter. Records that do not hold what is needed are counted, and why is said. A connection that was
denied by its name has no addresses in its record: by them a new policy may still deny it.

Exits with 0 when nothing would change, 1 when something would."""
)
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@log_option
@json_option
def diff(old: Path, new: Path, log: Path | None, as_json: bool) -> None:
    """Say what another policy would have made of what agents did."""
    from aa.policy.replay import difference

    told = difference(loaded(old), loaded(new), records(log)).as_json()
    if as_json:
        print_json(told)
    else:
        _print_difference(told)
    if told["changes"]:
        click.get_current_context().exit(1)


def _print_difference(told: Mapping[str, Any]) -> None:
    print_table(
        ("change", "times", "what", "target", "agent", "old", "new"),
        [
            (
                c["change"],
                c["count"],
                c["kind"],
                c["target"],
                c["agent"] or c["user"],
                _answer(c["old"]),
                _answer(c["new"]),
            )
            for c in told["changes"]
        ],
    )
    click.echo(
        f"{told['replayed']} acts replayed: {told['changed']} would be answered otherwise, "
        f"{told['by_another_rule']} the same by another rule",
        err=True,
    )
    _print_left_out(told["not_replayed"])


def _print_left_out(left_out: Mapping[str, int]) -> None:
    for why, count in left_out.items():
        click.echo(f"{count} not replayed: {why}", err=True)


def _answer(answer: Mapping[str, Any]) -> str:
    would = f" (enforced: {answer['would']})" if answer["would"] else ""
    return f"{answer['effect']}{would} {answer['rule']}"


# -- learn -------------------------------------------------------------------------------------


@click.command(
    epilog="""\b
Examples:
  aasm policy use observe                                  let it do what it does, and record it
  aasm policy learn --run k3v9x2mq                         print a proposal
  aasm policy learn --run k3v9x2mq --output proposal.toml
  aasm policy learn --run k3v9x2mq --log /srv/audit.jsonl --json

The proposal allows what the run did and nothing else: the names and ports that it connected to, the
requests that were inspected, the tools, MCP servers and models that it called, the programs that it
started, the folders that it wrote to. What a rule was against is left out and named in the file, and so
is what failed and what no rule can say. It is for a person to read and change. It is never written into
policy.d and never used by itself: copy it there when it says what you want.

Exits with 1 when the log has nothing of the run."""
)
@click.option("--run", "run_id", required=True, metavar="RUN", help="The run to learn from.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write a new file instead."
)
@log_option
@json_option
def learn(run_id: str, output: Path | None, log: Path | None, as_json: bool) -> None:
    """Propose the least policy that allows what a run did."""
    import tomli_w

    from aa.policy.learn import propose
    from aa.policy.replay import Replay

    _refuse_policy_folder(output)
    replay = Replay()
    questions = list(replay.questions(_of_run(records(log), run_id)))
    if not questions:
        raise Failure(
            f"the log has nothing that run {run_id} did", hint="`aasm runs list --ended` names runs"
        )
    run = replay.runs.get(run_id) or questions[0].run
    proposal = propose(run, questions, tomli_w.dumps)
    if output is not None:
        _write_new(output, proposal.text)
    if as_json:
        print_json(
            {
                "proposal": proposal.text,
                "rules": proposal.rules,
                "acts": proposal.total,
                "allowed": proposal.allowed,
                "left": [x.as_json() for x in proposal.left],
                "not_replayed": dict(replay.left_out),
            }
        )
    elif output is None:
        click.echo(proposal.text, nl=False)
    told = f"{proposal.rules} rules allow {proposal.allowed} of {proposal.total} acts"
    where = f"; {output} is for you to read" if output else ""
    click.echo(told + where, err=True)
    _print_left_out(replay.left_out)


def _of_run(found: Iterator[Record | None], run: str) -> Iterator[Record]:
    for record in found:
        if record is not None and record.get("run") == run:
            yield record


def _refuse_policy_folder(output: Path | None) -> None:
    """What is in policy.d is in force. Looks at where standard output goes too."""
    where = output or _standard_output()
    folder, forbidden = where.parent.resolve(), POLICY_DIR.resolve()
    if folder == forbidden or forbidden in folder.parents:
        raise Failure(
            f"{where} would be in force as soon as it is written",
            hint="write it elsewhere, read it, and copy what you want into policy.d",
        )


def _standard_output() -> Path:
    """The file that it is, or a name of the kernel's for what is no file."""
    try:
        return Path(os.readlink("/proc/self/fd/1"))
    except OSError:
        return Path("/dev/stdout")


def _write_new(path: Path, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with open(os.open(path, flags, PROPOSAL_MODE), "w", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        raise Failure(f"{path} exists already", hint="name a new file") from None
    except OSError as e:
        raise Failure(f"{path}: {e.strerror}", hint="name a file in a folder of yours") from e
