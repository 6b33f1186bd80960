"""The codec's limits, the interface language, and a server and two clients over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.varlink import AsyncClient, Call, Client, Server, Service, VarlinkError, load_interface
from aa.varlink.codec import (
    MAX_DEPTH,
    MAX_MESSAGE,
    Framer,
    ProtocolError,
    _strict,
    _usual,
    decode,
    encode,
)
from aa.varlink.server import CALLS_PER_TURN, MAX_FDS, UNSENT_BEFORE_MORE, Limits
from aa.varlink.idl import IdlError, parse_interface

INTERFACES = ("Gateway", "Enforce", "Control", "Launch")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"])), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"])), json_values))
def test_what_is_encoded_is_decoded_again(message: dict[str, Any]) -> None:
    assert decode(encode(message)[:-1]) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        assert isinstance(decode(data), dict)
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "message",
    [
        b"[]",
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":[-1E+400]}',
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":"\\ud800"}',
        b'{"\\udc00":1}',
        b'{"a":"\xff"}',
        b"{" * 5000,
        b'{"a":' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}",
        b'{"a":' + b"1" * 5000 + b"}",
    ],
)
def test_refuses_what_two_readers_could_read_differently(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(message)


space = st.sampled_from(["", "", "", " ", "\t", "\n", "\r"])
written_text = st.text(st.sampled_from('ab":\\ ,{}\u00e9'), max_size=4).map(
    lambda t: json.dumps(t, ensure_ascii=len(t) % 2 == 0)
)
written_scalar = written_text | st.sampled_from(
    ["1", "-0.5", "true", "null", "NaN", "1e999", '"\\ud800"']
)


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """JSON objects as text, with few keys, so that some are there twice, and spaces anywhere."""
    pair = st.builds(
        lambda k, a, b, v: f"{k}{a}:{b}{v}", written_text | st.just('"k"'), space, space, values
    )
    return st.lists(pair, max_size=3).map(lambda pairs: "{" + ",".join(pairs) + "}")


written = st.recursive(
    written_scalar,
    lambda inner: objects(inner) | st.lists(inner, max_size=3).map(lambda v: f"[{','.join(v)}]"),
    max_leaves=12,
)


@given(objects(written), space)
def test_the_quick_way_to_read_a_message_reads_what_the_strict_one_does_or_nothing(
    text: str, behind: str
) -> None:
    message = (text + behind).encode()
    try:
        strict = _strict(message)
    except ProtocolError:
        strict = None
    usual = _usual(message)
    assert usual is None or usual == strict
    if strict is not None:
        assert decode(message) == strict
    else:
        with pytest.raises(ProtocolError):
            decode(message)


@pytest.mark.parametrize(
    "message",
    [
        b'{"a" :1,"a":2}',
        b'{"a":"x\\":","a":2}',
        b'{"a":{"b":1,"b":2},"c":"\\":"}',
        b'{"a":[{"b":1,"b":2}]}',
        b'{"a"\t:1,"a":1}',
    ],
)
def test_a_key_given_twice_is_found_however_it_is_hidden(message: bytes) -> None:
    assert _usual(message) is None
    with pytest.raises(ProtocolError, match="twice"):
        decode(message)


def test_what_our_own_clients_write_is_read_the_quick_way() -> None:
    action = {"kind": "tool.call", "target": "x", "attributes": {"args": {"a": ["b:c", 'd"']}}}
    message = {"method": "a.B", "parameters": {"action": action, "n": [{}, {"k": None}]}}
    assert _usual(encode(message)[:-1]) == message


def test_accepts_a_deep_message_within_the_limit() -> None:
    depth = MAX_DEPTH - 1
    assert decode(b'{"a":' + b"[" * depth + b"]" * depth + b"}")


def test_brackets_in_text_are_not_nesting() -> None:
    text = "[{" * 500 + '\\"'
    assert decode(encode({"a": text})[:-1]) == {"a": text}


def test_a_framer_cuts_at_every_offset_alike() -> None:
    stream = encode({"a": 1}) + encode({"b": "x"})
    for cut in range(len(stream)):
        framer = Framer()
        assert framer.feed(stream[:cut]) + framer.feed(stream[cut:]) == [b'{"a":1}', b'{"b":"x"}']


def test_a_framer_refuses_a_message_without_an_end() -> None:
    framer = Framer()
    with pytest.raises(ProtocolError):
        for _ in range(MAX_MESSAGE // 65536 + 2):
            framer.feed(b"x" * 65536)


@pytest.mark.parametrize("name", INTERFACES)
def test_every_shipped_interface_parses(name: str) -> None:
    interface = load_interface(f"io.agentassembly.{name}")
    assert interface.methods
    for method in interface.methods:
        interface.wrong_parameter(method, {})  # every named type resolves


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("interface a.b\nmethod X(a: int -> ()", "line 2"),
        ("interface a.b\n\n!", "line 3"),
        ("", "line 1"),
    ],
)
def test_a_broken_definition_names_its_line(text: str, line: str) -> None:
    with pytest.raises(IdlError) as e:
        parse_interface(text)
    assert line in str(e.value)


TEST_INTERFACE = parse_interface(
    "interface t.t\n"
    "type S (x: int, y: ?string)\n"
    "method M(a: bool, e: (one, two), l: []S, m: [string]float, o: ?object) -> ()\n"
)


def test_parameters_that_fit_are_accepted() -> None:
    good = {"a": True, "e": "one", "l": [{"x": 1}, {"x": 2, "y": "z"}], "m": {"k": 1.5}}
    assert TEST_INTERFACE.wrong_parameter("M", good) is None


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"a": 1}, "a"),
        ({"a": None}, "a"),
        ({"e": "three"}, "e"),
        ({"l": [{"x": True}]}, "l"),
        ({"l": [{"x": 1, "typo": 2}]}, "l"),
        ({"l": {}}, "l"),
        ({"m": {"k": "v"}}, "m"),
        ({"o": []}, "o"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_parameters_that_do_not_fit_are_named(change: dict[str, Any], wrong: str) -> None:
    good = {"a": True, "e": "one", "l": [], "m": {}}
    assert TEST_INTERFACE.wrong_parameter("M", {**good, **change}) == wrong


def test_a_type_may_name_itself() -> None:
    linked = parse_interface("interface t.t\ntype N (v: int, next: ?N)\nmethod M(n: N) -> ()\n")
    assert linked.wrong_parameter("M", {"n": {"v": 1, "next": {"v": 2}}}) is None
    assert linked.wrong_parameter("M", {"n": {"v": 1, "next": {"v": "2"}}}) == "n"


# -- a real server; the Launch interface serves because it has streams and descriptors


@contextmanager
def launch_server(
    path: Path,
    *,
    refused: str | None = None,
    limits: Limits = Limits(fds=MAX_FDS),
    **methods: Any,
) -> Iterator[Path]:
    """A server of io.agentassembly.Launch in a thread of its own."""

    def unexpected(call: Call) -> dict[str, Any]:
        raise VarlinkError("io.agentassembly.Launch.BadRequest", {"reason": "not in this test"})

    names = load_interface("io.agentassembly.Launch").methods
    functions = {n: unexpected for n in names} | methods
    ready, stop = threading.Event(), []

    async def live() -> None:
        service = Service("test", "0")
        service.add("io.agentassembly.Launch", functions)
        server = Server.at(path, service, admit=lambda peer: refused, limits=limits)
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(end.set))
        ready.set()
        await end.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    assert ready.wait(5)
    try:
        yield path
    finally:
        stop[0]()
        thread.join(5)


def test_a_call_is_answered_and_knows_its_caller(tmp_path: Path) -> None:
    seen = []

    def kill(call: Call) -> dict[str, Any]:
        seen.append((call.parameters["run"], call.peer.pid, call.peer.uid))
        return {}

    with launch_server(tmp_path / "s", Kill=kill) as path, Client(path) as client:
        assert client.call("io.agentassembly.Launch.Kill", {"run": "r"}) == {}
    assert seen == [("r", os.getpid(), os.getuid())]


def test_an_error_is_typed_and_the_connection_goes_on(tmp_path: Path) -> None:
    with launch_server(tmp_path / "s") as path, Client(path) as client:
        with pytest.raises(VarlinkError) as e:
            client.call("io.agentassembly.Launch.Kill", {"run": "r"})
        assert (e.value.name, e.value.parameters) == ("BadRequest", {"reason": "not in this test"})
        assert client.call("org.varlink.service.GetInfo")["product"] == "test"


def test_an_exception_in_a_method_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    def kill(call: Call) -> dict[str, Any]:
        raise ZeroDivisionError("of course")

    with launch_server(tmp_path / "s", Kill=kill) as path, Client(path) as client:
        with pytest.raises(VarlinkError, match="InternalError"):
            client.call("io.agentassembly.Launch.Kill", {"run": "r"})
        assert client.call("org.varlink.service.GetInfo")["product"] == "test"


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("io.agentassembly.Launch.Kill", {}, "InvalidParameter"),
        ("io.agentassembly.Launch.Kill", {"run": 1}, "InvalidParameter"),
        ("io.agentassembly.Launch.Kill", {"run": "r", "uid": 0}, "InvalidParameter"),
        ("io.agentassembly.Launch.Nothing", {}, "MethodNotFound"),
        ("io.agentassembly.Nothing.Kill", {}, "InterfaceNotFound"),
    ],
)
def test_a_wrong_call_gets_the_protocols_own_error(
    tmp_path: Path, method: str, parameters: dict[str, Any], error: str
) -> None:
    with launch_server(tmp_path / "s") as path, Client(path) as client:
        with pytest.raises(VarlinkError) as e:
            client.call(method, parameters)
        assert e.value.name == error


def test_a_refused_peer_is_told_why_and_can_call_nothing(tmp_path: Path) -> None:
    with launch_server(tmp_path / "s", refused="not you") as path, Client(path) as client:
        with pytest.raises(VarlinkError) as e:
            client.call("org.varlink.service.GetInfo")
        assert (e.value.name, e.value.parameters["reason"]) == ("PermissionDenied", "not you")


def test_a_stream_yields_until_its_end(tmp_path: Path) -> None:
    async def wait(call: Call) -> AsyncIterator[dict[str, Any]]:
        for n in range(3):
            yield {"event": str(n), "run": "r", "notes": [], "reason": ""}

    with launch_server(tmp_path / "s", Wait=wait) as path, Client(path) as client:
        events = [r["event"] for r in client.stream("io.agentassembly.Launch.Wait", {"run": "r"})]
        assert events == ["0", "1", "2"]
        assert client.call("org.varlink.service.GetInfo")["product"] == "test"


def test_without_more_a_stream_is_its_first_reply(tmp_path: Path) -> None:
    async def wait(call: Call) -> AsyncIterator[dict[str, Any]]:
        yield {"event": "first", "run": "r", "notes": [], "reason": ""}
        yield {"event": "second", "run": "r", "notes": [], "reason": ""}

    with launch_server(tmp_path / "s", Wait=wait) as path, Client(path) as client:
        reply = client.call("io.agentassembly.Launch.Wait", {"run": "r"})
        assert reply["event"] == "first"
        assert client.call("org.varlink.service.GetInfo")["product"] == "test"


def test_descriptors_arrive_with_the_call(tmp_path: Path) -> None:
    got = []

    def kill(call: Call) -> dict[str, Any]:
        got.append(os.read(call.fds.pop(), 100))
        return {}

    read_end, write_end = os.pipe()
    os.write(write_end, b"through")
    with launch_server(tmp_path / "s", Kill=kill) as path, Client(path) as client:
        client.call("io.agentassembly.Launch.Kill", {"run": "r"}, fds=[read_end])
    os.close(read_end)
    os.close(write_end)
    assert got == [b"through"]


def test_garbage_ends_its_connection_and_no_other(tmp_path: Path) -> None:
    with launch_server(tmp_path / "s") as path, Client(path) as bystander:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.settimeout(5)
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n\0")
            assert raw.recv(10) == b""
        assert bystander.call("org.varlink.service.GetInfo")["product"] == "test"


def test_calls_of_an_asyncio_client_may_overlap(tmp_path: Path) -> None:
    def kill(call: Call) -> dict[str, Any]:
        if call.parameters["run"] == "bad":
            raise VarlinkError("io.agentassembly.Launch.RunUnknown", {"reason": "bad"})
        return {}

    async def talk(path: Path) -> list[Any]:
        client = await AsyncClient.connect(path)
        calls = [client.call("io.agentassembly.Launch.Kill", {"run": r}) for r in ("a", "bad", "c")]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return list(results)

    with launch_server(tmp_path / "s", Kill=kill) as path:
        first, second, third = asyncio.run(talk(path))
    assert first == third == {}
    assert isinstance(second, VarlinkError)


def test_a_missed_deadline_ends_an_asyncio_client(tmp_path: Path) -> None:
    async def kill(call: Call) -> dict[str, Any]:
        await asyncio.sleep(5)
        return {}

    async def talk(path: Path) -> None:
        client = await AsyncClient.connect(path)
        with pytest.raises(TimeoutError):
            await client.call("io.agentassembly.Launch.Kill", {"run": "r"}, timeout=0.05)
        with pytest.raises(ConnectionError):
            await client.call("org.varlink.service.GetInfo")
        await client.close()

    with launch_server(tmp_path / "s", Kill=kill) as path:
        asyncio.run(talk(path))


# -- what a hostile peer can take of others

CALL = b'{"method":"io.agentassembly.Launch.Kill","parameters":{"run":"%s"}}\0'


def test_descriptors_close_the_connection_where_none_are_taken(tmp_path: Path) -> None:
    for limits, answered in ((Limits(), False), (Limits(fds=1), True)):
        path = tmp_path / str(answered)
        with launch_server(path, limits=limits), socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.settimeout(5)
            with open(os.devnull) as null:
                socket.send_fds(raw, [CALL % b"r"], [null.fileno()])
            assert bool(raw.recv(10)) is answered


def test_a_peer_that_floods_does_not_keep_others_from_their_turn(tmp_path: Path) -> None:
    order: list[str] = []
    asked = threading.Event()

    def kill(call: Call) -> dict[str, Any]:
        order.append(call.parameters["run"])
        if len(order) == 1:
            assert asked.wait(5)  # the other peer's call waits too from here on
        return {}

    with launch_server(tmp_path / "s", Kill=kill) as path:
        with socket.socket(socket.AF_UNIX) as flood, socket.socket(socket.AF_UNIX) as quiet:
            quiet.connect(str(path))
            quiet.settimeout(5)
            flood.connect(str(path))
            flood.sendall(CALL % b"flood" * 500)
            while not order:
                time.sleep(0.001)
            quiet.sendall(CALL % b"quiet")
            asked.set()
            assert quiet.recv(100)
            assert order.index("quiet") <= 2 * CALLS_PER_TURN


def test_a_peer_that_does_not_read_is_not_answered_further_and_loses_nothing(
    tmp_path: Path,
) -> None:
    answered = 0
    size = 16 << 10

    def kill(call: Call) -> dict[str, Any]:
        nonlocal answered
        answered += 1
        raise VarlinkError("io.agentassembly.Launch.BadRequest", {"reason": "x" * size})

    with launch_server(tmp_path / "s", Kill=kill) as path, Client(path) as bystander:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.settimeout(5)
            raw.sendall(CALL % b"r" * 250)
            before = -1
            while answered != before:
                before = answered
                time.sleep(0.2)
            kernel = raw.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            assert answered <= (UNSENT_BEFORE_MORE + 2 * kernel) / size + 2 < 250
            assert bystander.call("org.varlink.service.GetInfo")["product"] == "test"
            replies = 0
            while replies < 250:
                replies += raw.recv(1 << 16).count(b"\0")
    assert answered == 250


def test_a_listener_over_its_rate_makes_its_peers_wait(tmp_path: Path) -> None:
    took = {}
    for rate in (100.0, 1e6):
        done = 0

        def kill(call: Call) -> dict[str, Any]:
            nonlocal done
            done += 1
            return {}

        began = time.monotonic()
        limits = Limits(calls_per_second=rate)
        path = tmp_path / str(rate)
        with launch_server(path, limits=limits, Kill=kill), Client(path) as client:
            for _ in range(150):
                client.call("io.agentassembly.Launch.Kill", {"run": "r"})
        assert done == 150
        took[rate] = time.monotonic() - began
    assert took[100.0] > 0.4 > took[1e6]


def test_connections_over_the_listeners_limit_are_closed(tmp_path: Path) -> None:
    with launch_server(tmp_path / "s", limits=Limits(connections_per_uid=2)) as path:
        with Client(path) as first, Client(path) as second:
            for client in (first, second):
                client.call("org.varlink.service.GetInfo")
            with Client(path) as third, pytest.raises(OSError):
                third.call("org.varlink.service.GetInfo")
        time.sleep(0.1)  # until it has seen both ends
        with Client(path) as later:
            later.call("org.varlink.service.GetInfo")
