"""Secrets in requests: where they come from, where they go, and that no answer shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.model import MalformedValue
from aa.proxy.inspect.secret import Injection, Mask, NoSecret, read_credential

WRITTEN: dict[str, Any] = {
    "id": "files/github",
    "source": {"credential": "github-token"},
    "header": "Authorization",
    "format": "Bearer {}",
    "placeholder": "aa-github-placeholder",
}


def test_fills_a_header_that_holds_the_placeholder() -> None:
    one = Injection.from_json(WRITTEN)
    assert one.is_asked_for(b"token aa-github-placeholder")
    assert not one.is_asked_for(b"token of my own")
    assert one.filled(b"s3cret") == b"Bearer s3cret"


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""},
        {"source": {}},
        {"source": "x"},
        {"source": {"credential": "../x"}},
        {"source": {"credential": ""}},
        {"source": {"credential": "a/b"}},
        {"format": "Bearer"},
        {"format": "{}{}"},
        {"placeholder": ""},
        {"header": 7},
        {"colour": "red"},
    ],
)
def test_an_obligation_that_is_not_known_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedValue):
        Injection.from_json({**WRITTEN, **changes})


def test_reads_a_credential_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"s3cret-token\n")
    assert read_credential("t", str(tmp_path)) == b"s3cret-token"


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"short", b"two\nlines", b"nul\0nul", b"tab\ttab", b"x" * 20_000, b"\xff" * 9],
)
def test_a_credential_that_is_no_secret_is_refused_without_a_word_of_it(
    tmp_path: Path, text: bytes
) -> None:
    (tmp_path / "t").write_bytes(text)
    with pytest.raises(NoSecret) as refused:
        read_credential("t", str(tmp_path))
    assert not text.strip() or text[:5].decode("latin-1") not in str(refused.value)


def test_a_missing_credential_says_what_to_do(tmp_path: Path) -> None:
    for directory in ("", str(tmp_path)):
        with pytest.raises(NoSecret, match="LoadCredential=t:PATH"):
            read_credential("t", directory)


SECRETS = (b"abcabd", b"s3cret-token")


@given(
    st.lists(
        st.sampled_from([b"abc", b"abd", b"ab", b"s3cret", b"-token", b"x", b"s"]), max_size=12
    ),
    st.lists(st.integers(1, 5), max_size=30),
)
def test_masks_a_stream_however_it_is_cut(words: list[bytes], cuts: list[int]) -> None:
    text = b"".join(words)
    mask, out, at = Mask(SECRETS), b"", 0
    for cut in [*cuts, len(text)]:
        part = text[at : at + cut]
        at += cut
        if part:
            out += mask.feed(part)
    out += mask.feed(b"")
    assert out == Mask(SECRETS).all(text) and len(out) == len(text)
    assert not any(secret in out for secret in SECRETS)


def test_only_what_may_begin_a_secret_waits() -> None:
    mask = Mask((b"secret",))
    assert mask.feed(b"hello sec") == b"hello "
    assert mask.feed(b"ond") == b"second"
    assert mask.feed(b"data: 1\n\n") == b"data: 1\n\n"
