"""`aasm policy explain` without a gateway: a URL is taken apart, and what an allow is bound to is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from aa.cli.main import root

POLICY = """
[policy]
id = "p"
[[rule]]
id = "messages"
effect = "allow"
network = { hosts = ["api.example"], methods = ["POST"], paths = ["/v1/messages"] }
[[rule]]
id = "local"
effect = "allow"
network = { cidrs = ["::1/128"], ports = [8080] }
[[rule]]
id = "no-secrets"
effect = "deny"
network = { hosts = ["**"], body = { secrets = ["any"] } }
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "p.toml").write_text(POLICY)
    return tmp_path


def explain(files: Path, *arguments: str) -> Result:
    return CliRunner().invoke(root, ["policy", "explain", "--files", str(files), *arguments])


@pytest.mark.parametrize(
    ("url", "more", "effect", "rule"),
    [
        ("https://api.example/v1/messages", {"method": "POST"}, "allow", "p/messages"),
        ("https://api.example:443/v1/messages?x=1", {"method": "POST"}, "allow", "p/messages"),
        ("http://user@api.example/v1/messages", {"method": "POST"}, "allow", "p/messages"),
        ("api.example/v1/messages", {"method": "POST"}, "allow", "p/messages"),
        ("https://api.example/v1/messages", {}, "deny", "<default>"),
        ("https://api.example/v1/%2e%2e/x", {"method": "POST"}, "deny", "<ambiguous-path>"),
        ("http://[::1]:8080/", {}, "allow", "p/local"),
        ("https://other.example", {"body": {"secrets": ["jwt"]}}, "deny", "p/no-secrets"),
    ],
)
def test_a_request_is_explained_by_its_url(
    files: Path, url: str, more: dict[str, object], effect: str, rule: str
) -> None:
    done = explain(files, "http.request", url, "--attributes", json.dumps(more), "--json")
    decision = json.loads(done.output)["decision"]
    assert (decision["effect"], decision["rule"]) == (effect, rule)
    assert done.exit_code == (0 if effect == "allow" else 1)


def test_what_an_allow_is_bound_to_is_told(files: Path) -> None:
    done = explain(files, "net.connect", "api.example:443")
    assert done.exit_code == 0
    assert "provided that: inspect" in done.output


def test_a_url_with_an_impossible_port_is_refused(files: Path) -> None:
    done = explain(files, "http.request", "https://api.example:99999/")
    assert done.exit_code != 0 and "decision" not in done.output
