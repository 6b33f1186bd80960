"""Facts about bodies and messages: what is planted is found, and nothing but names is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

from aa.policy.content import DETECTORS, body_facts, judges, message_facts

PLANTED = {
    "aws-access-key": b"AKIA" + b"ABCDEFGHIJKLMNOP",
    "github-token": b"ghp_" + b"a1B2" * 9,
    "private-key": b"-----BEGIN " + b"PRIVATE KEY-----",
    "slack-token": b"xoxb-" + b"123456789012",
}
"""Put together here, so that no scanner takes this file for a leak."""
WORDS = (
    *PLANTED.values(),
    b"sk-",
    b"sk-ant-",
    b"eyJ",
    b"AIza",
    b"-----BEGIN ",
    b"\0",
    b"%20",
    b"gh",
)


def seeds() -> Iterator[bytes]:
    for value in PLANTED.values():
        yield b"\x05*x*\n" + b'{"a": "' + value + b'"}'
    yield b"\x00a?c*\n" + "größe abc".encode("utf-16-le")
    yield b"\x07**\n" + b"sk-" * 50 + b"eyJ" * 50


def one(data: bytes) -> None:
    head, newline, content = data.partition(b"\n")
    if not newline or not head:
        return
    at = head[0] * len(content) // 256
    text = head[1:64].decode("latin-1")
    texts = [text] if text else []
    wanted = {"secrets": ["any"], "texts": texts}
    facts = body_facts(wanted, content)
    assert facts["bytes"] == len(content)
    assert set(facts["secrets"]) <= set(DETECTORS) and set(facts["texts"]) <= set(texts)
    json.dumps(facts)
    for name, secret in PLANTED.items():
        planted = content[:at] + b" " + secret + b" " + content[at:]
        assert name in body_facts({"secrets": [name]}, planted)["secrets"], name
    for direction in ("out", "in"):
        wanted = {"secrets": ["any"], direction: texts}
        told = message_facts(wanted, direction, content)
        assert told["texts"] == facts["texts"]
        assert judges(wanted, direction) or not told["texts"]
        message_facts(wanted, direction, content.decode("utf-8", "surrogateescape"))
