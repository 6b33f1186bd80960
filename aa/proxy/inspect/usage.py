"""What a model request asks for and what its provider says it used: Anthropic's and OpenAI's shapes. No I/O.

Answers are read as they pass, and only what mentions `usage` is taken apart. What could not be read
is told as unknown, never as nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINE_LIMIT = 4 << 20
"""Bytes of one line of an event stream; the last one of some providers repeats the whole answer."""
ANSWER_LIMIT = 8 << 20
"""Bytes of an answer that is no event stream."""
MODEL_LIMIT = 128

METERED = (
    "/v1/messages",
    "/v1/complete",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
)
"""Paths that are model requests whatever their body looks like."""
UNMETERED = ("/v1/messages/count_tokens",)
"""Paths that name a model and cost nothing."""
BATCHES = ("/v1/messages/batches", "/v1/batches")
"""What is used by these is told at another time, to nobody who counts."""


def may_be_model_request(method: str, path: str, content_type: str) -> bool:
    """Whether a request to a provider must be read to know."""
    if method != "POST" or path in UNMETERED:
        return False
    return path in METERED or content_type.partition(";")[0].strip().lower() == "application/json"


@dataclass(frozen=True, slots=True)
class Asked:
    """A model request. `tells_usage` is False for a stream that will not say what it used."""

    model: str
    tells_usage: bool = True


def asked(path: str, content: bytes) -> Asked | None:
    """What a request's body asks for; None when it names no model."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= MODEL_LIMIT or not model.isprintable():
        return None
    quiet = path in ("/v1/chat/completions", "/v1/completions") and body.get("stream") is True
    options = body.get("stream_options")
    told = isinstance(options, dict) and options.get("include_usage") is True
    return Asked(model, not quiet or told)


@dataclass(slots=True)
class Tokens:
    """What an answer said so far; later words replace earlier ones. None: not said."""

    input: Any = None
    output: Any = None
    cache_read: Any = 0
    cache_write: Any = 0

    def take(self, usage: Mapping[str, Any]) -> None:
        if "prompt_tokens" in usage or "input_tokens_details" in usage:
            self._take_openai(usage)
            return
        self.input = _first(usage, "input_tokens", default=self.input)
        self.output = _first(usage, "output_tokens", default=self.output)
        self.cache_read = _first(usage, "cache_read_input_tokens", default=self.cache_read)
        self.cache_write = _first(usage, "cache_creation_input_tokens", default=self.cache_write)

    def _take_openai(self, usage: Mapping[str, Any]) -> None:
        """Of OpenAI's input, what was cached is a part."""
        whole = _first(usage, "prompt_tokens", "input_tokens", default=self.input)
        details = _first(usage, "prompt_tokens_details", "input_tokens_details", default={})
        cached = _first(details, "cached_tokens", default=0) if isinstance(details, dict) else None
        self.output = _first(usage, "completion_tokens", "output_tokens", default=0)
        if _count(whole) and _count(cached) and cached <= whole:
            self.input, self.cache_read = whole - cached, cached
        else:
            self.input, self.cache_read = whole, cached

    @property
    def known(self) -> bool:
        return all(map(_count, (self.input, self.output, self.cache_read, self.cache_write)))

    def as_json(self) -> dict[str, Any]:
        """What is not a count is told as it is: who charges by it charges the most."""
        return {
            "input_tokens": _told(self.input),
            "output_tokens": _told(self.output),
            "cache_read_tokens": _told(self.cache_read),
            "cache_write_tokens": _told(self.cache_write),
        }


def _first(usage: Mapping[str, Any], *names: str, default: Any) -> Any:
    return next((usage[n] for n in names if usage.get(n) is not None), default)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _told(value: Any) -> Any:
    return value if _count(value) else "unknown"


class UsageReader:
    """Fed an answer's body as it comes. `tokens` is what it said; `problem` why it cannot be known."""

    def __init__(self, content_type: str, content_encoding: str) -> None:
        self.tokens = Tokens()
        self.problem = ""
        kind = content_type.partition(";")[0].strip().lower()
        self._events = kind == "text/event-stream"
        self._held = bytearray()
        if content_encoding.strip().lower() not in ("", "identity"):
            self.problem = f"the answer is encoded ({content_encoding[:40]})"

    def feed(self, data: bytes) -> None:
        if self.problem:
            return
        if self._events:
            self._lines(data)
            return
        self._held += data
        if len(self._held) > ANSWER_LIMIT:
            self._give_up(f"the answer is larger than {ANSWER_LIMIT} bytes")

    def end(self) -> None:
        """The answer is whole."""
        if self.problem:
            return
        if self._events:
            self._line(bytes(self._held))
        else:
            self._take(bytes(self._held))
        self._held.clear()
        if not self.problem and not self.tokens.known:
            self.problem = "the answer does not say what was used"

    def _lines(self, data: bytes) -> None:
        """Only the new bytes are searched: a provider may send a long line byte by byte."""
        first, *others = data.split(b"\n")
        self._held += first
        for other in others:
            if not self.problem:
                self._line(bytes(self._held))
                self._held = bytearray(other)
        if len(self._held) > LINE_LIMIT:
            self._give_up(f"an event is larger than {LINE_LIMIT} bytes")

    def _line(self, line: bytes) -> None:
        if len(line) > LINE_LIMIT:
            self._give_up(f"an event is larger than {LINE_LIMIT} bytes")
        elif line.startswith(b"data:") and b'"usage"' in line:
            self._take(line[5:])

    def _take(self, text: bytes) -> None:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            self._give_up("what the answer says of its usage cannot be read")
            return
        if not isinstance(said, dict):
            return
        for holder in (said, said.get("message"), said.get("response")):
            usage = holder.get("usage") if isinstance(holder, dict) else None
            if isinstance(usage, dict):
                self.tokens.take(usage)

    def _give_up(self, why: str) -> None:
        self.problem = why
        self._held.clear()


def charged(reader: UsageReader | None, *, whole: bool, sent: int, received: int) -> dict[str, Any]:
    """The attributes of a report. An answer that broke off is charged by what is known of it, and
    for the rest by its bytes: no token is shorter than one."""
    tokens = reader.tokens if reader is not None else Tokens()
    if reader is not None and whole:
        told = Tokens().as_json() if reader.problem else tokens.as_json()
        return {**told, "problem": reader.problem} if reader.problem else told
    rest = Tokens(
        tokens.input if _count(tokens.input) else sent,
        max(received, tokens.output if _count(tokens.output) else 0),
        tokens.cache_read if _count(tokens.cache_read) else 0,
        tokens.cache_write if _count(tokens.cache_write) else 0,
    )
    return {**rest.as_json(), "problem": "the answer broke off; counted by its bytes"}
