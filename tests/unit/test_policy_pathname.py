"""Patterns of paths against a plain regular expression, and the one form of a request's path."""

from __future__ import annotations

import re
import time
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa.policy.pathname import (
    AmbiguousPath,
    components,
    file_pattern,
    normal_path,
    read_path,
    request_pattern,
)
from aa.policy.pattern import InvalidPattern

parts = st.lists(st.sampled_from(["a", "b", "ab", "c.d"]), min_size=1, max_size=5)
pattern_parts = st.lists(
    st.sampled_from(["a", "b", "*", "**", "a*", "*b", "*.d"]), min_size=1, max_size=5
)


def expression(pattern: list[str], whole: bool) -> str:
    """The same pattern as a regular expression over the whole path."""
    found = ""
    for n, part in enumerate(pattern):
        if part != "**":
            found += "/" + re.escape(part).replace(r"\*", "[^/]*")
        elif n < len(pattern) - 1 or whole:
            found += "(?:/[^/]*)*"
        else:
            found += "(?:/[^/]*)+"
    return found


@settings(max_examples=500)
@given(pattern_parts, parts, st.booleans())
def test_matches_what_a_regular_expression_does(
    pattern: list[str], path: list[str], whole: bool
) -> None:
    text = "/" + "/".join(path)
    found = file_pattern("/" + "/".join(pattern), whole=whole).matches(components(text))
    assert found is bool(re.fullmatch(expression(pattern, whole), text))


@settings(max_examples=300)
@given(pattern_parts, pattern_parts, parts, st.booleans(), st.booleans())
def test_a_pattern_that_covers_another_matches_what_that_one_does(
    one: list[str], other: list[str], path: list[str], whole: bool, other_whole: bool
) -> None:
    wide = file_pattern("/" + "/".join(one), whole=whole)
    narrow = file_pattern("/" + "/".join(other), whole=other_whole)
    if wide.covers(narrow) and narrow.matches(path):
        assert wide.matches(path)


def test_covering_is_seen_where_it_is_plain() -> None:
    for wide, narrow in (("/a/**", "/a/b/*"), ("/a/**", "/a/b"), ("/a/*", "/a/b"), ("/a", "/a")):
        assert file_pattern(wide, whole=False).covers(file_pattern(narrow, whole=False))
    for wide, narrow in (("/a/*", "/a/b/c"), ("/a/b", "/a/*"), ("/a/**", "/a"), ("~/a", "/a")):
        assert not file_pattern(wide, whole=False).covers(file_pattern(narrow, whole=False))


def test_hostile_patterns_and_paths_take_no_time() -> None:
    pattern = file_pattern("/" + "/".join(["**", "a*a*a*b"] * 100), whole=True)
    path = components("/" + "/".join(["a" * 200] * 400))
    begin = time.process_time()
    assert not pattern.matches(path)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a/b", "neither absolute"),
        ("~", "neither absolute"),
        ("~dev/a", "neither absolute"),
        ("/a/../b", "normal form"),
        ("/a//b", "normal form"),
        ("//a", "normal form"),
        ("/a/", "normal form"),
        ("~/./a", "normal form"),
        ("/a/b?", "a ?"),
        ("/a/b**", "inside a component"),
        ("/a/***", "inside a component"),
    ],
)
def test_patterns_of_files_that_mean_nothing(text: str, words: str) -> None:
    with pytest.raises(InvalidPattern, match=re.escape(words)):
        file_pattern(text, whole=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "does not begin with /"),
        ("*", "does not begin with /"),
        ("/a?q=1", "a query"),
        ("/a#b", "a query or a fragment"),
        ("/a%20b", "a %"),
        ("/a\\b", "the character"),
        ("/a;b", "the character"),
        ("/a//b", "an empty segment"),
        ("/a/../b", "a dot segment"),
        ("/a/.", "a dot segment"),
        ("/**x", "inside a component"),
    ],
)
def test_patterns_of_requests_that_no_request_fits(text: str, words: str) -> None:
    with pytest.raises(InvalidPattern, match=re.escape(words)):
        request_pattern(text, whole=False)


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20))
def test_what_a_client_encodes_is_decoded_to_what_it_meant(text: str) -> None:
    name = re.sub(r"[/\\.%;]", "x", text)
    assert normal_path("/v1/" + urllib.parse.quote(name, safe="")) == "/v1/" + name


@settings(max_examples=500)
@given(st.text(max_size=30), st.sampled_from(["", "/"]))
def test_any_text_has_one_form_or_is_ambiguous(text: str, before: str) -> None:
    raw = before + text
    path, found, why = read_path(raw)
    if why:
        assert (path, found) == ("", ())
        with pytest.raises(AmbiguousPath):
            normal_path(raw)
        return
    assert path.startswith("/") and "//" not in path and "\\" not in path
    assert not {".", ".."} & set(path.split("/"))
    assert found == tuple(path[1:].split("/"))


@given(st.binary(max_size=12))
def test_no_encoding_hides_a_slash_or_a_dot(data: bytes) -> None:
    raw = "/a" + "".join(f"%{byte:02x}" for byte in data)
    try:
        path = normal_path(raw)
    except AmbiguousPath:
        return
    assert path.count("/") == 1 and "." not in path and "%" not in path


def test_a_path_longer_than_the_limit_is_ambiguous() -> None:
    assert normal_path("/" + "a" * 8191)
    with pytest.raises(AmbiguousPath, match="longer"):
        normal_path("/" + "a" * 8192)
