"""Strict reading of TOML: who may have written a file, what it may say, where errors point."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from aa.tomlfile import (
    DEPTH_LIMIT,
    InvalidFile,
    Problem,
    did_you_mean,
    dotted,
    load,
    parse,
    read,
    validate,
)

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$", "x-says": "letters"},
        "hosts": {"type": "array", "minItems": 1, "items": {"type": "string"}},
        "port": {"type": "integer", "minimum": 1, "maximum": 65535},
        "mode": {"enum": ["enforce", "observe"]},
        "future": {"not": {}, "x-not-built": "the section future"},
        "rule": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["id"],
                "properties": {"id": {"type": "string"}, "hosts": {"type": "array"}},
            },
        },
    },
}


def written(tmp_path: Path, text: str | bytes, mode: int = 0o644) -> Path:
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def problems_of(text: str, schema: dict[str, Any] | None = None) -> list[Problem]:
    return validate(parse(text, file="f.toml"), schema or SCHEMA)


def refusal(text: str | bytes) -> Problem:
    with pytest.raises(InvalidFile) as caught:
        parse(text, file="f.toml")
    return caught.value.problems[0]


# -- who may have written it -------------------------------------------------------------------


def test_reads_file_that_only_its_owner_can_write(tmp_path: Path) -> None:
    assert read(written(tmp_path, "a = 1\n")) == b"a = 1\n"


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_refuses_file_writable_by_group_or_others(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InvalidFile, match="can be written by its group or by others"):
        read(written(tmp_path, "a = 1", mode))


def test_refuses_file_in_directory_writable_by_others(tmp_path: Path) -> None:
    path = written(tmp_path, "a = 1")
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidFile, match="its directory"):
        read(path)
    tmp_path.chmod(0o755)
    assert read(path)


def test_refuses_file_of_another_owner(tmp_path: Path) -> None:
    path = written(tmp_path, "a = 1")
    with pytest.raises(InvalidFile, match="belongs to user"):
        read(path, owners={os.geteuid() + 1})
    assert read(path, owners={os.geteuid()})


def test_refuses_link_that_leaves_its_directory(tmp_path: Path) -> None:
    outside = written(tmp_path, "a = 1")
    folder = tmp_path / "policy.d"
    folder.mkdir()
    (folder / "a.toml").symlink_to(outside)
    with pytest.raises(InvalidFile, match="link that leaves its directory"):
        read(folder / "a.toml")


def test_follows_link_inside_its_directory(tmp_path: Path) -> None:
    path = written(tmp_path, "a = 1")
    (tmp_path / "b.toml").symlink_to(path.name)
    assert read(tmp_path / "b.toml") == b"a = 1"


def test_refuses_fifo_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.toml")
    with pytest.raises(InvalidFile, match="not a regular file"):
        read(tmp_path / "f.toml")


def test_refuses_directory_and_link_loop(tmp_path: Path) -> None:
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(InvalidFile, match="not a regular file"):
        read(tmp_path / "d.toml")
    (tmp_path / "l.toml").symlink_to("l.toml")
    with pytest.raises(InvalidFile, match="cannot be read"):
        read(tmp_path / "l.toml")


def test_size_limit_is_exact(tmp_path: Path) -> None:
    path = written(tmp_path, "x" * 10)
    assert len(read(path, limit=10)) == 10
    with pytest.raises(InvalidFile, match="larger than 9 bytes"):
        read(path, limit=9)


def test_missing_file_is_told_apart_from_an_invalid_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.toml")


# -- what it may say ---------------------------------------------------------------------------


def test_syntax_error_has_its_line() -> None:
    problem = refusal("a = 1\nb = = 2\n")
    assert (problem.file, problem.line) == ("f.toml", 2)
    assert "not valid TOML" in problem.message


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"a = 1\nb = '\xff'\n", 2, "UTF-8"),
        (b"a = 1\n\nb = '\0'\n", 3, "NUL"),
        ("a = 1\na = 2\n", 2, "overwrite"),
        ("a = nan\n", 1, "not a number"),
        ("b = 1\na = [1.0, inf]\n", 2, "not a number"),
        ("a = 9223372036854775808\n", 1, "64 bits"),
        ("a = '\ud800'\n", 1, "UTF-8"),
        ("a = " + "9" * 5000 + "\n", 1, ""),
        ("a = " + "[" * 5000 + "]" * 5000, 1, "nested"),
        ("a = " + "[" * (DEPTH_LIMIT + 1) + "]" * (DEPTH_LIMIT + 1), 1, "nested"),
        ("a = " + "{a = " * 5000 + "1" + "}" * 5000, 1, "nested"),
    ],
    ids=range(11),
)
def test_refuses_what_no_policy_needs(content: str | bytes, line: int, words: str) -> None:
    problem = refusal(content)
    assert problem.line == line
    assert words in problem.message


def test_accepts_nesting_at_the_limit() -> None:
    depth = DEPTH_LIMIT - 1
    assert parse("a = " + "[" * depth + "]" * depth, file="f").data["a"] is not None


def test_digest_changes_with_any_byte() -> None:
    one, other = parse("a = 1", file="f"), parse("a = 1 ", file="f")
    assert one.digest != other.digest
    assert one.data == other.data


# -- errors ------------------------------------------------------------------------------------


def test_unknown_key_has_line_and_suggestion() -> None:
    (problem,) = problems_of("# a comment\n[[rule]]\nid = 'a'\nhots = ['x']\n")
    assert (problem.line, problem.key) == (4, "rule[0].hots")
    assert problem.fix == "did you mean 'hosts'?"


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("hosts = []", 1, "hosts", "empty list"),
        ("\nhosts = 'a'", 2, "hosts", "must be a list, not text"),
        ("port = 443.0", 1, "port", "must be a whole number, not a number"),
        ("port = true", 1, "port", "must be a whole number, not true or false"),
        ("port = 0", 1, "port", "below 1"),
        ("port = 70000", 1, "port", "above 65535"),
        ("port = 1979-05-27", 1, "port", "a date or time"),
        ("mode = 'enfroce'", 1, "mode", "not one of"),
        ("name = ''", 1, "name", "is empty"),
        ("name = 'A'", 1, "name", "is not valid here"),
        ("hosts = ['a',\n 'b',\n 3]", 3, "hosts[2]", "must be text"),
        ("[[rule]]\nhosts = [1]", 1, "rule[0]", "'id' is missing"),
        ("[[rule]]\nid='a'\n[[rule]]\nid = 2", 4, "rule[1].id", "must be text"),
        ("rule = [{id = 'a'},\n {id = 2}]", 2, "rule[1].id", "must be text"),
        ("[future]\na = 1", 1, "future", "the section future is not built"),
    ],
)
def test_each_mistake_names_line_and_key(text: str, line: int, key: str, words: str) -> None:
    problem = problems_of(text)[0]
    assert (problem.line, problem.key) == (line, key)
    assert words in problem.message


def test_pattern_refuses_a_newline_at_the_end() -> None:
    assert problems_of('name = "abc\\n"')
    assert not problems_of('name = "abc"')


def test_valid_document_has_no_problems() -> None:
    assert problems_of("name = 'a'\nhosts = ['b']\nport = 443\nmode = 'observe'\n") == []


def test_problems_come_in_the_order_of_lines_and_are_bounded() -> None:
    lines = [p.line for p in problems_of("port = 0\nhosts = []\nmode = 'x'\n")]
    assert lines == [1, 2, 3]
    many = problems_of("".join(f"key{i} = 1\n" for i in range(1000)))
    assert len(many) == 101
    assert "more than 100" in many[-1].message


def test_problem_reads_as_compilers_write_it() -> None:
    problem = Problem("a.toml", 3, "rule[0].id", "is missing", "add it")
    assert str(problem) == "a.toml:3: rule[0].id: is missing (add it)"
    assert json.loads(json.dumps(problem.as_json()))["line"] == 3


def test_load_raises_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile) as caught:
        load(written(tmp_path, "port = 0\nx = 1\n"), SCHEMA)
    assert len(caught.value.problems) == 2
    assert load(written(tmp_path, "port = 1\n"), SCHEMA).data == {"port": 1}


def test_did_you_mean_lists_what_is_known_when_nothing_is_close() -> None:
    assert did_you_mean("zzz", {"b", "a"}) == "known: a, b"


def test_dotted_quotes_odd_names() -> None:
    assert dotted(("a", 0, "b c", "d")) == 'a[0]."b c".d'


# -- lines -------------------------------------------------------------------------------------

EVERY_SYNTAX = '''\
# every way to write a key
title = "x # not a comment"
"quoted \\u0041" = 'single # quoted'
a.b."c.d" = 1

[table] # comment
key = """
many
lines \\""" still"""
after = \'\'\'
'' two
\'\'\'
list = [
  1, # one
  { inner = [ "x",
     "y" ], deep.er = true },
  """]
""",
]
last = 1979-05-27T07:32:00Z

[[many]]
id = 1
  [many.sub]
  x = 1
  [[many.items]]
  y = 1
  [[many.items]]
  y = 2
[[many]]
id = 2
[[many.items]]
y = 3
[ "spaced" . name ]
z = -1.5e3
'''

EXPECTED_LINES = {
    ("title",): 2,
    ("quoted A",): 3,
    ("a", "b", "c.d"): 4,
    ("table",): 6,
    ("table", "key"): 7,
    ("table", "after"): 10,
    ("table", "list"): 13,
    ("table", "list", 0): 14,
    ("table", "list", 1): 15,
    ("table", "list", 1, "inner"): 15,
    ("table", "list", 1, "inner", 1): 16,
    ("table", "list", 1, "deep", "er"): 16,
    ("table", "list", 2): 17,
    ("table", "last"): 20,
    ("many", 0): 22,
    ("many", 0, "id"): 23,
    ("many", 0, "sub", "x"): 25,
    ("many", 0, "items", 0, "y"): 27,
    ("many", 0, "items", 1, "y"): 29,
    ("many", 1): 30,
    ("many", 1, "items", 0, "y"): 33,
    ("spaced", "name", "z"): 35,
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_finds_the_line_of_every_key(newline: str) -> None:
    document = parse(EVERY_SYNTAX.replace("\n", newline), file="f")
    assert {path: document.line(path) for path in EXPECTED_LINES} == EXPECTED_LINES


def test_line_of_an_absent_key_is_that_of_its_table() -> None:
    assert parse(EVERY_SYNTAX, file="f").line(("many", 1, "none", "at all")) == 30


def every_path(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list):
        children = enumerate(node)
    return [p for key, value in children for p in [(*path, key), *every_path(value, (*path, key))]]


def test_every_path_of_the_data_has_a_line() -> None:
    document = parse(EVERY_SYNTAX, file="f")
    assert set(every_path(document.data)) == set(document.lines)


names = st.text(min_size=1, max_size=4)
scalars = st.one_of(
    st.text(max_size=8), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(-1e9, 1e9)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, values, max_size=4))
def test_every_path_of_any_written_data_has_a_line(data: dict[str, Any]) -> None:
    text = tomli_w.dumps(data).replace("\x00", "")
    document = parse(text, file="f")
    assert set(every_path(document.data)) == set(document.lines)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text("ab=[]{}'\".,#\n\\ 1", max_size=40)))
def test_any_bytes_are_read_or_refused_and_never_crash(content: bytes | str) -> None:
    try:
        document = parse(content, file="f")
    except InvalidFile as e:
        assert all(p.line >= 1 for p in e.problems)
        return
    text = content if isinstance(content, str) else content.decode()
    assert document.data == tomllib.loads(text)
    validate(document, SCHEMA)
