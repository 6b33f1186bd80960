"""Facts about bodies and messages: which secrets and which texts are in them."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.policy.content import DETECTORS, body_facts, judges, message_facts

# Put together here, so that no scanner of repositories takes the test for a leak.
EXAMPLES = {
    "private-key": ["-----BEGIN " + kind + "PRIVATE KEY-----" for kind in ("", "RSA ", "OPENSSH ")]
    + ["-----BEGIN PGP " + "PRIVATE KEY BLOCK-----", "-----BEGIN%20" + "PRIVATE%20KEY-----"]
    + ["-----BEGIN+EC+" + "PRIVATE+KEY-----"],
    "aws-access-key": ["AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "ABCDEFGHIJKLMNO2"],
    "github-token": ["ghp_" + "a1B2" * 9, "gho_" + "x" * 36, "github_pat_" + "A1_b" * 20],
    "gitlab-token": ["glpat-" + "x1Y2" * 5],
    "slack-token": ["xoxb-" + "123456789012-abcdef"],
    "anthropic-key": ["sk-ant-" + "api03-" + "aB3_" * 20],
    "openai-key": ["sk-" + "aB3d" * 12, "sk-proj-" + "aB3_" * 12],
    "google-key": ["AIza" + "SyA-1_b" * 5],
    "stripe-key": ["sk_live_" + "a1B2" * 6, "rk_test_" + "a1B2" * 6],
    "huggingface-token": ["hf_" + "aBcD" * 9],
    "jwt": ["eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0In0" + "." + "aB3_" * 10],
}
HARMLESS = [
    "the quick brown fox",
    "a risk-assessment-of-the-whole-project-with-hyphens",
    "class=sk-loading-indicator-wrapper-container-element",
    "-----BEGIN CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----",
    "AKIAsomething",
    "eyJust a word. eyJ another.",
    "https://example.org/path?query=value&other=123456789012345678901234567890",
    "3f786850e387550fdab836ed7e6dc881de23001b",
    base64.b64encode(bytes(range(256))).decode(),
]
ALL = {"secrets": ["any"]}


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(
    "around", ["{}", "token={}&x=1", '{{"key": "{}"}}', "a\n{}\nb", "Bearer {}."]
)
def test_finds_each_kind_of_secret_wherever_it_stands(name: str, around: str) -> None:
    for example in EXAMPLES[name]:
        data = around.format(example).encode()
        assert body_facts({"secrets": [name]}, data)["secrets"] == [name], data
        assert body_facts(ALL, data)["secrets"] == [name], data


@pytest.mark.parametrize("name", DETECTORS)
def test_finds_secrets_in_utf_16_too(name: str) -> None:
    for encoding in ("utf-16", "utf-16-be"):
        data = f"key: {EXAMPLES[name][0]}".encode(encoding)
        assert body_facts(ALL, data)["secrets"] == [name]


@pytest.mark.parametrize("text", HARMLESS)
def test_takes_nothing_harmless_for_a_secret(text: str) -> None:
    assert body_facts(ALL, text.encode())["secrets"] == []


def test_tells_names_and_sizes_alone() -> None:
    data = ("x" * 10 + " " + EXAMPLES["jwt"][0] + " DROP TABLE users").encode()
    wanted = {"secrets": ["any"], "texts": ["*DROP TABLE*", "*drop table*", "x*s"]}
    facts = body_facts(wanted, data)
    assert facts == {"secrets": ["jwt"], "texts": ["*DROP TABLE*", "x*s"], "bytes": len(data)}


def test_a_body_that_is_no_text_is_looked_at_all_the_same() -> None:
    data = b"\xff\xfe\x00DROP\x00 " + EXAMPLES["github-token"][0].encode() + b"\x80"
    facts = body_facts({**ALL, "texts": ["*DROP*"]}, data)
    assert facts["secrets"] == ["github-token"]
    assert facts["texts"] == ["*DROP*"]


def test_a_detector_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="'pasword'"):
        body_facts({"secrets": ["pasword"]}, b"")


def test_messages_are_judged_by_direction() -> None:
    wanted = {"out": ["*out*"], "in": ["*in*"], "secrets": ["jwt"]}
    text = "in and out " + EXAMPLES["jwt"][0]
    assert message_facts(wanted, "out", text) == {
        "direction": "out",
        "secrets": ["jwt"],
        "texts": ["*out*"],
        "bytes": len(text),
    }
    assert message_facts(wanted, "in", text.encode())["secrets"] == []
    assert message_facts(wanted, "in", text)["texts"] == ["*in*"]
    with pytest.raises(ValueError, match="neither"):
        message_facts(wanted, "both", text)


def test_messages_of_a_direction_that_no_rule_is_about_need_no_decision() -> None:
    assert not judges({"out": [], "in": ["*"], "secrets": []}, "out")
    assert judges({"out": [], "in": [], "secrets": ["any"]}, "out")
    assert not judges({"out": [], "in": [], "secrets": ["any"]}, "in")
    assert judges({"out": [], "in": ["*"], "secrets": []}, "in")


@given(st.one_of(st.text(), st.binary()))
def test_no_message_is_too_odd(message: str | bytes) -> None:
    facts = message_facts({"out": ["*a*", "?"], "in": [], "secrets": ["any"]}, "out", message)
    assert facts["bytes"] >= len(message)


def test_a_lone_surrogate_does_no_harm() -> None:
    assert message_facts({"out": ["*"], "secrets": ["any"]}, "out", "\ud800")["texts"] == ["*"]


@pytest.mark.parametrize(
    "unit",
    [b"sk-", b"sk-A", b"eyJ", b"eyJaaaaaaaa.", b"-----BEGIN A ", b"xox", b"AKIA", b"a-", b"\0"],
)
def test_a_large_hostile_body_takes_no_more_than_its_size(unit: bytes) -> None:
    data = unit * ((1 << 20) // len(unit))
    begin = time.process_time()
    body_facts({"secrets": ["any"], "texts": ["*a*b*c*", "?*?*?"]}, data)
    assert time.process_time() - begin < 5
