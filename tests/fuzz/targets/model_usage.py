"""Answers of model providers: the same usage however they are cut, and never nothing for what is not known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from aa.gateway.limits import usage_of
from aa.proxy.inspect.usage import METERED, UsageReader, asked, charged, may_be_model_request

WORDS = (
    b"data: ", b'"usage"', b'{"usage":{"input_tokens":1,"output_tokens":2}}', b"\n\n", b"\r\n", b"[DONE]",
    b'"prompt_tokens"', b'"completion_tokens"', b'"prompt_tokens_details":{"cached_tokens":1}',
    b'"message":', b'"response":', b"1e999", b"NaN", b"-1", b"true", b"99999999999999999999", b"event: x\n",
    b'"model"', b'"stream":true', b'"stream_options":{"include_usage":true}',
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    anthropic = {"input_tokens": 3, "output_tokens": 1, "cache_read_input_tokens": 5}
    start = {"type": "message_start", "message": {"usage": anthropic}}
    delta = {"type": "message_delta", "usage": {"output_tokens": 15}}
    openai = {
        "prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    events = "".join(f"event: x\ndata: {json.dumps(x)}\n\n" for x in (start, delta)).encode()
    yield b"\x01\x05" + events
    chunks = (json.dumps({"choices": [], "usage": u}) for u in (None, openai))
    yield b"\x01\x40" + "".join(f"data: {c}\n\n" for c in chunks).encode() + b"data: [DONE]\n\n"
    yield b"\x00\x09" + json.dumps({"model": "m", "usage": openai}).encode()
    yield b"\x00\xff" + json.dumps({"response": {"usage": anthropic}, "stream": True}).encode()
    yield b"\x01\xff" + b'data: {"error": "overloaded"}\n\n'


def one(data: bytes) -> None:
    if len(data) < 2:
        return
    kind = ("application/json", "text/event-stream; charset=utf-8")[data[0] & 1]
    step, data = data[1] + 1, data[2:]
    whole, cut = UsageReader(kind, ""), UsageReader(kind, "")
    whole.feed(data)
    for at in range(0, len(data), step):
        cut.feed(data[at : at + step])
        _charged(charged(cut, whole=False, sent=10, received=at))
    whole.end()
    cut.end()
    assert (whole.tokens, whole.problem) == (cut.tokens, cut.problem)
    told = charged(whole, whole=True, sent=10, received=len(data))
    _charged(told)
    assert ("problem" in told) is (not whole.tokens.known or bool(whole.problem))
    for path in METERED:
        found = asked(path, data)
        assert found is None or found.model.isprintable()
        assert may_be_model_request("POST", path, "")


def _charged(told: dict[str, Any]) -> None:
    """Every count is one, or known to be unknown; and the gateway makes a usage of it."""
    for name, value in told.items():
        assert name == "problem" or value == "unknown" or (type(value) is int and value >= 0)
    assert usage_of(told).tokens >= 0
    json.dumps(told, allow_nan=False)
