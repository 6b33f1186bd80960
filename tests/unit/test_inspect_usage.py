"""What model requests ask for and use, in the shapes that providers answer with."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.gateway.limits import MAX_TOKENS, usage_of
from aa.proxy.inspect.usage import (
    ANSWER_LIMIT,
    LINE_LIMIT,
    Asked,
    UsageReader,
    asked,
    charged,
    may_be_model_request,
)

EVENTS = "text/event-stream; charset=utf-8"


def read(content_type: str, *parts: bytes) -> UsageReader:
    reader = UsageReader(content_type, "")
    for part in parts:
        reader.feed(part)
    reader.end()
    return reader


def events(*said: Any) -> bytes:
    return b"".join(b"event: e\ndata: " + json.dumps(s).encode() + b"\n\n" for s in said)


def counts(reader: UsageReader) -> list[Any]:
    return list(charged(reader, whole=True, sent=0, received=0).values())


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ({"input_tokens": 3, "output_tokens": 4}, [3, 4, 0, 0]),
        (
            {
                "input_tokens": 3,
                "output_tokens": 4,
                "cache_read_input_tokens": 5,
                "cache_creation_input_tokens": 6,
            },
            [3, 4, 5, 6],
        ),
        ({"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": None}, [3, 4, 0, 0]),
        ({"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}, [10, 4, 0, 0]),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 8},
            },
            [2, 4, 8, 0],
        ),
        (
            {
                "input_tokens": 10,
                "output_tokens": 4,
                "input_tokens_details": {"cached_tokens": 8},
            },
            [2, 4, 8, 0],
        ),
        ({"prompt_tokens": 10, "total_tokens": 10}, [10, 0, 0, 0]),
    ],
)
def test_reads_the_usage_of_an_answer(usage: dict[str, Any], told: list[int]) -> None:
    text = json.dumps({"id": "x", "usage": usage}).encode()
    assert counts(read("application/json", text)) == told
    assert counts(read("application/json", text[:9], text[9:])) == told
    assert counts(read(EVENTS, events({"usage": usage}))) == told


def test_later_words_of_a_stream_replace_earlier_ones() -> None:
    stream = events(
        {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"text": 'she said "usage"'}},
        {"type": "message_delta", "usage": {"output_tokens": 77}},
        {"type": "message_stop"},
    )
    assert counts(read(EVENTS, stream)) == [9, 77, 0, 0]
    assert counts(read(EVENTS, *(stream[i : i + 1] for i in range(len(stream))))) == [9, 77, 0, 0]


def test_reads_the_streams_of_openai() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 6}
    chat = events({"choices": [1], "usage": None}, {"choices": [], "usage": usage})
    assert counts(read(EVENTS, chat + b"data: [DONE]\n\n")) == [5, 6, 0, 0]
    usage = {"input_tokens": 5, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 1}}
    done = {"type": "response.completed", "response": {"usage": usage}}
    assert counts(read(EVENTS, events({"type": "response.created"}, done))) == [4, 6, 1, 0]


@pytest.mark.parametrize(
    ("content_type", "text", "words"),
    [
        ("application/json", b"{}", "does not say"),
        ("application/json", b"", "cannot be read"),
        ("application/json", b"not json", "cannot be read"),
        ("application/json", b"[1]", "does not say"),
        ("application/json", b'{"usage": 7}', "does not say"),
        ("application/json", b'{"usage": {"output_tokens": 5}}', "does not say"),
        ("application/json", b'{"usage": {"input_tokens": -1, "output_tokens": 5}}', "not say"),
        ("application/json", b'{"usage": {"input_tokens": true, "output_tokens": 5}}', "not say"),
        ("application/json", b'{"usage": {"input_tokens": "9", "output_tokens": 5}}', "not say"),
        ("application/json", b"[" * 100_000, "cannot be read"),
        ("application/json", b" " * (ANSWER_LIMIT + 1), "larger"),
        (EVENTS, b"data: " + b"x" * (LINE_LIMIT + 1), "larger"),
        (EVENTS, b'data: "usage" broken\n', "cannot be read"),
        (EVENTS, b"data: {}\n\n", "does not say"),
        ("", b"x", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_charged_as_the_most_and_says_why(
    content_type: str, text: bytes, words: str
) -> None:
    reader = read(content_type, text)
    assert words in reader.problem
    told = charged(reader, whole=True, sent=1, received=2)
    usage = usage_of({"provider": "p", "model": "m", **told})
    assert usage.output_tokens == MAX_TOKENS or usage.input_tokens == MAX_TOKENS


def test_an_encoded_answer_is_not_read() -> None:
    reader = UsageReader("application/json", "gzip")
    reader.feed(b"x")
    reader.end()
    assert "encoded" in reader.problem
    assert UsageReader("", "identity").problem == ""


def test_an_answer_that_breaks_off_is_charged_by_what_is_known_and_its_bytes() -> None:
    reader = UsageReader(EVENTS, "")
    reader.feed(events({"message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}))
    told = charged(reader, whole=False, sent=1000, received=300)
    assert (told["input_tokens"], told["output_tokens"]) == (9, 300)
    told = charged(None, whole=False, sent=1000, received=0)
    assert (told["input_tokens"], told["output_tokens"]) == (1000, 0)


def body(**more: Any) -> bytes:
    return json.dumps({"model": "m-1", **more}).encode()


@pytest.mark.parametrize(
    ("path", "content", "found"),
    [
        ("/v1/messages", body(), Asked("m-1")),
        ("/v1/messages", body(stream=True), Asked("m-1")),
        ("/v1/responses", body(stream=True), Asked("m-1")),
        ("/v1/chat/completions", body(), Asked("m-1")),
        ("/v1/chat/completions", body(stream=False), Asked("m-1")),
        ("/v1/chat/completions", body(stream=True), Asked("m-1", False)),
        ("/v1/chat/completions", body(stream=True, stream_options=7), Asked("m-1", False)),
        (
            "/v1/chat/completions",
            body(stream=True, stream_options={"include_usage": True}),
            Asked("m-1"),
        ),
        ("/x", b"", None),
        ("/x", b"[]", None),
        ("/x", b'{"model": 1}', None),
        ("/x", b'{"model": ""}', None),
        ("/x", b'{"model": "a\\nb"}', None),
        ("/x", json.dumps({"model": "x" * 129}).encode(), None),
        ("/x", b"\xff\xfe", None),
        ("/x", b"[" * 100_000, None),
    ],
)
def test_reads_what_a_request_asks_for(path: str, content: bytes, found: Asked | None) -> None:
    assert asked(path, content) == found


def test_tells_which_requests_must_be_read() -> None:
    assert may_be_model_request("POST", "/v1/messages", "")
    assert may_be_model_request("POST", "/other", "application/json; charset=utf-8")
    assert not may_be_model_request("GET", "/v1/messages", "application/json")
    assert not may_be_model_request("POST", "/upload", "multipart/form-data")
    assert not may_be_model_request("POST", "/v1/messages/count_tokens", "application/json")


@given(st.lists(st.binary(max_size=60)), st.sampled_from([EVENTS, "application/json"]))
def test_no_answer_makes_the_reader_fail(parts: list[bytes], content_type: str) -> None:
    reader = read(content_type, *parts)
    assert reader.problem or reader.tokens.known


def test_an_event_that_cannot_be_read_ends_the_reading_however_it_is_cut() -> None:
    events = b'data: "usage" broken\n\ndata: {"usage": {"input_tokens": 1, "output_tokens": 2}}\n\n'
    whole, cut = read(EVENTS, events), read(EVENTS, *(bytes((byte,)) for byte in events))
    assert (whole.problem, whole.tokens) == (cut.problem, cut.tokens)
    assert not whole.tokens.known


def test_a_long_event_in_small_pieces_takes_time_by_its_length() -> None:
    reader = UsageReader(EVENTS, "")
    before = time.process_time()
    for _ in range(400_000):
        reader.feed(b"x")
    assert time.process_time() - before < 5
    assert not reader.problem
