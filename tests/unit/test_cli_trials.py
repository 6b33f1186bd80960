"""`aasm policy test`, `diff` and `learn` as they are typed: tables, JSON, exit codes, and files not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aa.audit.record import Record
from aa.cli import records, trials
from aa.cli.main import root
from aa.model import Rung
from aa.policy import load, loads
from tests.unit.policy_log import connect, decided, started, tool, written
from tests.unit.test_policy_learn import OBSERVE
from tests.unit.test_policy_replay import NEW, OLD

CASES = """
[[case]]
name = "the forge is open"
action = { kind = "net.connect", target = "forge.example:443" }
expect = { effect = "allow", rule = "coding/forge" }

[[case]]
name = "and everything else is not"
action = { kind = "net.connect", target = "other.example:443" }
expect = { effect = "deny", rule = "<default>" }
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/p.toml").write_text(OLD)
    (tmp_path / "new.toml").write_text(NEW)
    (tmp_path / "cases.toml").write_text(CASES)
    return tmp_path


def log(path: Path, found: list[Record]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in written(found)))
    return path


def aasm(*words: str | Path) -> Result:
    """What a command printed and how it ended; a `Failure` has its words and its code."""
    result = CliRunner(mix_stderr=False).invoke(root, [str(w) for w in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# -- test


def test_answers_as_expected_are_counted_and_end_with_0(here: Path) -> None:
    done = aasm("policy", "test", "--files", here / "old", here / "cases.toml")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "2 cases, 0 answered otherwise than expected\n"


def test_another_answer_is_shown_with_its_place_and_ends_with_1(here: Path) -> None:
    done = aasm("policy", "test", "--files", here / "new.toml", here / "cases.toml")
    assert done.exit_code == 1
    assert f"{here}/cases.toml:2" in done.stdout.replace("\n", "")
    assert "the forge is open" in done.stdout and "effect allow" in done.stdout
    told = json.loads(
        aasm("policy", "test", "--json", "--files", here / "new.toml", here / "cases.toml").stdout
    )
    first, second = told["files"][0]["cases"]
    assert first["differences"]["effect"] == {"expected": "allow", "found": "deny"}
    assert (first["passed"], second["passed"]) == (False, True)


def test_a_policy_inside_the_file_is_used(here: Path) -> None:
    (here / "whole.toml").write_text(f"[files]\n\"p.toml\" = '''{OLD}'''\n" + CASES)
    assert aasm("policy", "test", here / "whole.toml").exit_code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CASES, "no [files]"),
        ("nonsense", "not valid TOML"),
        ("[[case]]\nname = 1\n", "case[0]"),
        ("[files]\n\"p.toml\" = '[policy]'\n" + CASES, "policy"),
    ],
)
def test_a_file_that_cannot_be_tried_is_an_error_and_no_pass(
    here: Path, text: str, words: str
) -> None:
    (here / "bad.toml").write_text(text)
    done = aasm("policy", "test", here / "bad.toml")
    assert done.exit_code == 1 and words in done.stderr


def test_the_vectors_of_this_tree_pass() -> None:
    found = sorted((Path(__file__).parents[1] / "vectors/policy").glob("*.toml"))
    assert aasm("policy", "test", *found).exit_code == 0


# -- diff


ACTS = [connect("forge.example:443"), connect("index.example:443"), tool("search")]


def test_what_would_change_is_listed_counted_and_ends_with_1(here: Path) -> None:
    path = log(here / "audit.jsonl", [started(), *decided(load(here / "old"), ACTS)])
    done = aasm("policy", "diff", here / "old", here / "new.toml", "--log", path)
    assert done.exit_code == 1
    opens, closes = (line.split() for line in done.stdout.splitlines()[1:])
    assert opens[:4] == ["opens", "1", "net.connect", "index.example:443"]
    assert closes[:4] == ["closes", "1", "net.connect", "forge.example:443"]
    assert done.stderr == (
        "3 acts replayed: 2 would be answered otherwise, 1 the same by another rule\n"
    )


def test_the_same_policy_changes_nothing_and_ends_with_0(here: Path) -> None:
    path = log(here / "audit.jsonl", [started(), *decided(load(here / "old"), ACTS)])
    done = aasm("policy", "diff", here / "old", here / "old", "--log", path, "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["changes"], told["replayed"]) == (0, [], 3)


def test_older_files_and_broken_lines_are_read_and_counted(here: Path) -> None:
    whole = written([started(), *decided(load(here / "old"), ACTS)])
    lines = [json.dumps(r) for r in whole]
    (here / "audit.jsonl.2").write_text(f"{lines[0]}\n{lines[1]}\n")
    (here / "audit.jsonl.1").write_text(f"{lines[2]}\n" + "not a record\n")
    (here / "audit.jsonl").write_text(f"{lines[3]}\n")
    told = json.loads(
        aasm(
            "policy", "diff", here / "old", here / "new.toml",
            "--log", here / "audit.jsonl", "--json",
        ).stdout
    )  # fmt: skip
    assert told["replayed"] == 3
    assert told["not_replayed"] == {"a line that is no record": 1}


def test_a_policy_that_is_not_fit_to_be_used_is_an_error(here: Path) -> None:
    (here / "bad.toml").write_text("[policy]\n")
    path = log(here / "audit.jsonl", [started()])
    done = aasm("policy", "diff", here / "bad.toml", here / "old", "--log", path)
    assert done.exit_code == 1 and "aasm policy check" in done.stderr
    gone = aasm("policy", "diff", here / "old", here / "old", "--log", here / "no.jsonl")
    assert gone.exit_code == 1 and "is no file" in gone.stderr
    missing = aasm("policy", "diff", here / "no", here / "old", "--log", path)
    assert missing.exit_code == 1 and "does not exist" in missing.stderr


# -- learn


def observed(here: Path) -> Path:
    policy = loads({"o.toml": OBSERVE})
    return log(here / "audit.jsonl", [started(), *decided(policy, ACTS)])


def learn(here: Path, *more: str | Path) -> Result:
    return aasm("policy", "learn", "--run", "k3v9x2mq", "--log", observed(here), *more)


def test_a_proposal_is_printed_and_fit_to_be_used(here: Path) -> None:
    done = learn(here)
    assert done.exit_code == 0
    assert [r.id for r in loads({"p.toml": done.stdout}).rules] == ["tls-443", "tools"]
    assert done.stderr == "2 rules allow 3 of 3 acts\n"


def test_a_proposal_is_written_to_a_new_file_that_is_for_its_owner_alone(here: Path) -> None:
    output = here / "proposal.toml"
    done = learn(here, "--output", output)
    assert (done.exit_code, done.stdout) == (0, "")
    assert output.stat().st_mode & 0o777 == 0o600
    assert load(output).rules
    again = learn(here, "--output", output)
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_what_is_learned_as_json_says_what_it_leaves_out(here: Path) -> None:
    told: dict[str, Any] = json.loads(learn(here, "--json").stdout)
    assert (told["acts"], told["allowed"], told["left"]) == (3, 3, [])
    assert told["proposal"].startswith("# Proposed")


def test_a_proposal_is_never_written_where_it_would_be_in_force(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = here / "etc/policy.d"
    real.mkdir(parents=True)
    (here / "link").symlink_to(real)
    monkeypatch.setattr(trials, "POLICY_DIR", here / "link")
    for output in (real / "x.toml", here / "link/x.toml", real / "../policy.d/x.toml"):
        done = learn(here, "--output", output)
        assert done.exit_code == 1 and "would be in force" in done.stderr
    monkeypatch.setattr(trials, "_standard_output", lambda: real / "x.toml")
    assert "would be in force" in learn(here).stderr
    assert list(real.iterdir()) == []


def test_a_run_that_did_nothing_has_no_proposal(here: Path) -> None:
    done = aasm("policy", "learn", "--run", "other", "--log", observed(here))
    assert done.exit_code == 1 and "nothing that run other did" in done.stderr


def test_who_cannot_read_the_log_asks_the_gateway(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = observed(here)
    found = [json.loads(line) for line in path.read_text().splitlines()]

    class Client:
        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def stream(self, method: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
            assert method == "io.agentassembly.Control.TailAudit"
            return [{"records": found[:2]}, {"records": found[2:]}]

    monkeypatch.setattr(records, "AUDIT_FILE", here / "nothing")
    monkeypatch.setattr(records, "control", lambda **_: Client())
    done = aasm("policy", "learn", "--run", "k3v9x2mq")
    assert done.stderr == "2 rules allow 3 of 3 acts\n"
    monkeypatch.setattr(records, "FROM_GATEWAY", 3)
    assert "only the newest" in aasm("policy", "learn", "--run", "k3v9x2mq").stderr


# -- check


def test_check_says_for_every_rule_what_enforces_it_here(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = '[[rule]]\nid = "su"\neffect = "deny"\nexec = { paths = ["/usr/bin/su", "/opt/*/su"] }\n'
    (here / "old/p.toml").write_text(OLD + more)
    monkeypatch.setattr("aa.cli.host._rung", lambda: Rung.CGROUP)
    done = aasm("policy", "check", here / "old")
    assert done.exit_code == 0
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert ["coding/forge", "allow", "proxy"] in [line[:3] for line in lines]
    assert ["coding/su", "deny", "unit"] in [line[:3] for line in lines]
    assert "detect only" in done.stdout and "rung cgroup" in done.stdout
    told = json.loads(aasm("policy", "check", here / "old", "--json").stdout)
    assert told["host"]["rung"] == "cgroup"
    assert {e["key"] for e in told["enforcement"]} >= {"coding/forge", "coding/search", "coding/su"}
