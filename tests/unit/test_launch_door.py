"""What a run's shim says as its last word: nothing, or a failure; whatever the bytes are."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aa.launch.door import Shim, ShimFailed


def said(data: bytes) -> ShimFailed | None:
    async def main() -> ShimFailed | None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                theirs.sendall(data)
            try:
                await Shim(ours).executed()
            except ShimFailed as e:
                return e
        return None

    return asyncio.run(main())


def test_a_shim_that_says_nothing_has_become_the_program() -> None:
    assert said(b"") is None


def test_a_shim_that_failed_says_where_and_why() -> None:
    failed = said(json.dumps({"failed": "exec", "reason": "no such file", "code": 127}).encode())
    assert failed is not None
    assert (failed.step, failed.reason, failed.code) == ("exec", "no such file", 127)


@given(st.binary(min_size=1, max_size=200))
@example(b"[" * 100_000)
@example(b'{"failed":"x","reason":"y","code":1e999}')
@example(b'{"failed":"x","reason":"y","code":' + b"9" * 5000 + b"}")
@example(b"[]\0")
def test_any_words_are_a_failure(data: bytes) -> None:
    assert said(data) is not None


@pytest.mark.parametrize("code", [b"null", b'"x"', b"{}"])
def test_a_code_that_is_none_is_the_shims_own(code: bytes) -> None:
    failed = said(b'{"failed":"x","reason":"y","code":' + code + b"}")
    assert failed is not None and failed.code == 125
