"""The proxy's pure parts and its small machines: words of a refusal, HTTP written anew, dialling, names."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import time
from collections.abc import Coroutine, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.config import Proxy
from aa.model import Action, Kind, Mode, Report, Run, deny
from aa.proxy import connection, hostdns, http1, identify, sniff, splice
from aa.proxy import dial as dialling
from aa.proxy import dns as forwarder
from aa.proxy.answered import AnsweredNames
from aa.proxy.ask import Gateway, GatewayAway, Refusals
from aa.proxy.connection import Modes, Shared
from aa.proxy.denial import Refusal, http_answer, tls_alert
from aa.proxy.dial import Resolver, UpstreamFailed, address_of, dial, in_turn
from aa.proxy.front import Front
from aa.proxy.hostdns import HostNames, Nameservers, parse_hosts, parse_nameservers
from aa.proxy.http1 import Exchange, check_head, outgoing_head, unwanted_upgrade
from aa.proxy.identify import Client, Identify, Stranger
from aa.proxy.sniff import Head, Malformed, parse_head
from aa.proxy.splice import Relay, Way
from aa.sockdiag import SockDiagError, SocketOwner

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], seconds: float = 10.0) -> T:
    return asyncio.run(asyncio.wait_for(work, seconds))


def addresses(*texts: str) -> list[dialling.Address]:
    return [ip_address(t) for t in texts]


# -- the words of a refusal

REFUSAL = Refusal(
    deny("no rule allows it", rule="lab/none", policy="rev-7"), "net.connect", "a.test:80", "run1"
)


def test_an_alert_is_one_whole_record_that_openssl_reads() -> None:
    assert tls_alert(REFUSAL) == bytes.fromhex("15030300020231")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="a.test")
    incoming.write(tls_alert(REFUSAL))
    with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
        tls.do_handshake()


def test_an_upstream_that_failed_is_another_alert() -> None:
    failed = Refusal(deny("gone", rule="<upstream>"), "net.connect", "a.test:443", status=502)
    assert tls_alert(failed)[-1] == 80


def test_the_text_names_reason_rule_policy_run_and_commands() -> None:
    head, _, body = http_answer(REFUSAL).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 403 Forbidden\r\n")
    assert f"Content-Length: {len(body)}" in head
    for part in ("no rule allows it", "lab/none", "rev-7", "run1", "aasm why"):
        assert part in body
    assert "aasm policy explain net.connect a.test:80 --run run1" in body


def test_a_reason_cannot_write_headers() -> None:
    nasty = Refusal(deny("x\r\nSet-Cookie: a=b\r\n\r\n<script>", rule="r"), "net.connect", "a:80")
    head = http_answer(nasty).partition(b"\r\n\r\n")[0]
    assert b"Set-Cookie" not in head


@pytest.mark.parametrize(
    ("accept", "is_json"),
    [
        (b"application/json", True),
        (b"application/json;q=0.9, */*", True),
        (b"*/*", False),
        (b"text/html,application/json", False),
        (b"", False),
    ],
)
def test_json_is_for_who_asks_for_it(accept: bytes, is_json: bool) -> None:
    body = http_answer(REFUSAL, accept=accept).partition(b"\r\n\r\n")[2]
    if is_json:
        assert json.loads(body)["rule"] == "lab/none"
    else:
        assert body.startswith(b"Agent Assembly denied")


# -- one request, written anew


def head_of(*lines: str) -> Head:
    head = parse_head("\r\n".join((*lines, "", "")).encode())
    assert isinstance(head, Head), head
    return head


def test_the_origin_gets_origin_form_one_host_and_no_keep_alive() -> None:
    head = head_of(
        "POST http://A.test:8080/p?q HTTP/1.1",
        "Host: a.test.:8080",
        "Connection: keep-alive, X-Hop",
        "Keep-Alive: 5",
        "Proxy-Connection: keep-alive",
        "Proxy-Authorization: Basic c2VjcmV0",
        "TE: trailers",
        "X-Kept: \tv ",
        "Content-Length: 3",
    )
    assert outgoing_head(head, 8080) == (
        b"POST /p?q HTTP/1.1\r\nHost: a.test:8080\r\nx-kept: v\r\ncontent-length: 3\r\n"
        b"Connection: close\r\n\r\n"
    )


def test_an_address_in_v6_gets_its_brackets_back() -> None:
    assert b"Host: [fd00::1]\r\n" in outgoing_head(head_of("GET / HTTP/1.1", "Host: [fd00::1]"), 80)


def test_h11_reads_the_same_request_as_we_do() -> None:
    head = head_of("GET /x HTTP/1.1", "Host: a.test", "X: y")
    assert check_head(outgoing_head(head, 80), head) is None


def test_a_difference_between_two_readers_is_seen() -> None:
    head = head_of("GET /x HTTP/1.1", "Host: a.test")
    assert check_head(b"GET /y HTTP/1.1\r\nHost: a.test\r\n\r\n", head) is not None
    assert check_head(b"GET /x HTTP/1.1\r\nHost : a.test\r\n\r\n", head) is not None
    assert check_head(b"GET /x HTTP/1.1\r\nHost: a.test\r\n", head) is not None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["X-A", "content-length", "Transfer-Encoding", "Cookie", "Host"]),
            st.binary(max_size=20),
        ),
        max_size=5,
    )
)
def test_whatever_we_take_for_a_request_h11_takes_for_the_same(
    headers: list[tuple[str, bytes]],
) -> None:
    lines = b"".join(n.encode() + b": " + v + b"\r\n" for n, v in headers)
    head = parse_head(b"POST /x HTTP/1.1\r\nHost: a.test\r\n" + lines + b"\r\n")
    if isinstance(head, Malformed):
        return
    assert check_head(outgoing_head(head, 80), head) is None


@pytest.mark.parametrize(
    ("upgrade", "wanted"),
    [("websocket", "websocket"), ("h2c", None), ("H2C", None), ("h2c, websocket", "websocket")],
)
def test_only_harmless_upgrades_are_left_out(upgrade: str, wanted: str | None) -> None:
    head = head_of("GET / HTTP/1.1", "Host: a.test", f"Upgrade: {upgrade}")
    assert unwanted_upgrade(head) == wanted


def test_chunks_are_written_anew_without_extensions_and_trailers() -> None:
    body = http1._Chunked()
    out = body.feed(b"3;ext=1\r\nabc\r\n") + body.feed(b"0\r\nX-Trailer: y\r\n\r\nGET /2 HTTP")
    assert out == b"3\r\nabc\r\n0\r\n\r\n"
    assert body.complete and body.surplus == len(b"GET /2 HTTP")


@pytest.mark.parametrize("bad", [b"zz\r\n", b"-1\r\n", b"3 \r\n\x00", b"0x3\r\nabc"])
def test_broken_chunks_are_an_error(bad: bytes) -> None:
    with pytest.raises(h11.RemoteProtocolError):
        http1._Chunked().feed(bad + b"\r\n" * 3)


async def exchange(request: bytes, behind: bytes, client_sends: bytes = b"") -> tuple[bytes, str]:
    """What the origin got and how it ended; the origin closes as soon as it has answered."""
    client, front = socket.socketpair()
    upstream, origin = socket.socketpair()
    for sock in (client, front, upstream, origin):
        sock.setblocking(False)
    loop = asyncio.get_running_loop()
    head = parse_head(request)
    assert isinstance(head, Head)
    if client_sends:
        await loop.sock_sendall(client, client_sends)
    moving = asyncio.ensure_future(Exchange(front, upstream, idle=2).run(head, 80, behind))
    await asyncio.sleep(0.1)
    got = await loop.sock_recv(origin, 65536)
    origin.close()
    outcome = await moving
    for sock in (client, front, upstream):
        sock.close()
    return got, outcome.ended


def test_nothing_behind_the_body_is_forwarded() -> None:
    request = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\n"
    got, ended = run(exchange(request, b"abcGET /2 HTTP/1.1\r\n", b"Host: b.test\r\n\r\n"))
    assert got.endswith(b"\r\n\r\nabc") and b"/2" not in got and b"b.test" not in got
    assert ended == "closed"


def test_a_body_that_comes_later_is_forwarded_to_its_length_and_no_further() -> None:
    request = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 6\r\n\r\n"
    got, _ = run(exchange(request, b"ab", b"cdefGET /2 HTTP/1.1\r\n\r\n"))
    assert got.endswith(b"\r\n\r\nabcdef")


# -- moving


def pair() -> tuple[socket.socket, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    one = socket.create_connection(listener.getsockname())
    other = listener.accept()[0]
    listener.close()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


async def relayed(up: bytes, down: bytes, first: bytes = b"") -> tuple[bytes, bytes, str]:
    client, a = pair()
    b, origin = pair()
    loop = asyncio.get_running_loop()
    relay = asyncio.ensure_future(Relay(a, b, idle=5).run(first))

    async def send(sock: socket.socket, data: bytes) -> None:
        await loop.sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)

    async def receive(sock: socket.socket) -> bytes:
        got = b""
        while part := await loop.sock_recv(sock, 1 << 20):
            got += part
        return got

    _, _, to_origin, to_client = await asyncio.gather(
        send(client, up), send(origin, down), receive(origin), receive(client)
    )
    outcome = await relay
    assert (outcome.sent, outcome.received) == (len(first) + len(up), len(down))
    for sock in (client, a, b, origin):
        sock.close()
    return to_origin, to_client, outcome.ended


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
def test_a_relay_moves_every_byte_both_ways_in_order(size: int) -> None:
    up, down = os.urandom(size), os.urandom(size // 2)
    assert run(relayed(up, down, b"first")) == (b"first" + up, down, "closed")


def test_a_way_with_a_limit_moves_exactly_that_much() -> None:
    async def main() -> tuple[bytes, int]:
        client, a = pair()
        b, origin = pair()
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"0123456789")
        way = Way(a, b, lambda _: ended.set(), limit=4, half_close=False)
        way.start()
        await ended.wait()
        got = await loop.sock_recv(origin, 100)
        for sock in (client, a, b, origin):
            sock.close()
        return got, way.moved

    assert run(main()) == (b"0123", 4)


def test_an_idle_relay_ends() -> None:
    async def main() -> str:
        client, a = pair()
        b, origin = pair()
        outcome = await Relay(a, b, idle=0.2).run()
        for sock in (client, a, b, origin):
            sock.close()
        return outcome.ended

    assert run(main()) == "idle"


def test_no_pipe_with_bytes_in_it_is_used_again() -> None:
    """A sink that stops reading in the middle: its bytes must not reach the next connection."""

    async def main() -> None:
        splice._free.clear()
        client, a = pair()
        b, origin = pair()
        loop = asyncio.get_running_loop()
        relay = asyncio.ensure_future(Relay(a, b, idle=30).run())
        sending = asyncio.ensure_future(loop.sock_sendall(client, b"secret " * 2_000_000))
        await asyncio.sleep(0.3)
        relay.cancel()
        sending.cancel()
        await asyncio.gather(relay, sending, return_exceptions=True)
        for sock in (client, a, b, origin):
            sock.close()
        for pipe in splice._free:
            with pytest.raises(BlockingIOError):
                os.read(pipe.read, 10)

    run(main())
    assert run(relayed(b"mine", b"yours")) == (b"mine", b"yours", "closed")


# -- dialling


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("::ffff:169.254.169.254", "169.254.169.254"),
        ("fe80::1%eth0", "fe80::1"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_an_address_is_what_it_stands_for(text: str, address: str) -> None:
    assert str(address_of(text)) == address


def test_families_take_turns_and_the_first_stays_first() -> None:
    order = in_turn(addresses("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "192.0.2.3"))
    assert [str(a) for a in order] == [
        "192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::2", "192.0.2.3",
    ]  # fmt: skip


async def _dialled(*texts: str, port: int, seconds: float = 2.0) -> str:
    sock, address = await dial(addresses(*texts), port, seconds=seconds)
    sock.close()
    return str(address)


def test_dials_past_an_address_that_refuses() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        assert run(_dialled("127.0.0.3", "::1", "127.0.0.2", port=port)) == "127.0.0.2"


def test_says_what_each_address_did_when_none_answers() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UpstreamFailed) as failed:
        run(_dialled("127.0.0.2", "127.0.0.3", port=port))
    assert failed.value.error == "connection_refused"
    assert "127.0.0.3: Connection refused" in str(failed.value)


def resolver(tmp_path: Path, lookup: Any, hosts: str = "") -> Resolver:
    (tmp_path / "hosts").write_text(hosts)
    return Resolver(lookup=lookup, names=HostNames(tmp_path / "hosts"))


def test_resolves_by_the_hosts_file_without_asking(tmp_path: Path) -> None:
    def never(name: str) -> Sequence[str]:
        raise AssertionError(name)

    r = resolver(tmp_path, never, "192.0.2.1 a.test\n2001:db8::1 A.test. other\n")
    assert run(r.resolve("a.test")) == tuple(addresses("192.0.2.1", "2001:db8::1"))


def test_a_burst_of_connections_asks_the_resolver_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def lookup(name: str) -> Sequence[str]:
        asked.append(name)
        time.sleep(0.05)
        return ["192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"]

    async def main() -> list[tuple[dialling.Address, ...]]:
        r = resolver(tmp_path, lookup)
        burst = await asyncio.gather(*(r.resolve("a.test", run=str(i)) for i in range(20)))
        return [*burst, await r.resolve("a.test")]

    assert set(run(main())) == {tuple(addresses("192.0.2.1", "192.0.2.2"))}
    assert asked == ["a.test"]


def test_a_resolver_that_hangs_is_a_failure_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling, "RESOLVE_SECONDS", 0.1)

    def lookup(name: str) -> Sequence[str]:
        time.sleep(0.5)
        return ["192.0.2.1"]

    began = time.monotonic()
    with pytest.raises(UpstreamFailed) as failed:
        run(resolver(tmp_path, lookup).resolve("a.test"))
    assert failed.value.error == "dns_timeout" and time.monotonic() - began < 1


def test_one_run_cannot_hold_every_thread_of_the_resolver(tmp_path: Path) -> None:
    def lookup(name: str) -> Sequence[str]:
        time.sleep(0.2)
        return ["192.0.2.1"]

    async def main() -> list[Any]:
        r = resolver(tmp_path, lookup)
        greedy = [r.resolve(f"n{i}.test", run="greedy") for i in range(40)]
        modest = r.resolve("modest.test", run="modest")
        return await asyncio.gather(*greedy, modest, return_exceptions=True)

    *greedy, modest = run(main())
    assert sum(isinstance(x, UpstreamFailed) for x in greedy) == 40 - dialling.RESOLVING_PER_RUN
    assert modest == tuple(addresses("192.0.2.1"))


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), OSError("x")])
def test_a_name_that_does_not_resolve_is_a_failure(tmp_path: Path, error: OSError) -> None:
    def lookup(name: str) -> Sequence[str]:
        raise error

    with pytest.raises(UpstreamFailed) as failed:
        run(resolver(tmp_path, lookup).resolve("a.test"))
    assert failed.value.error == "dns_error"


def test_a_name_without_any_address_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(UpstreamFailed, match="no address"):
        run(resolver(tmp_path, lambda name: []).resolve("a.test"))


# -- names of this host


def test_reads_a_hosts_file_as_libc_does() -> None:
    text = "# c\n127.0.0.1 localhost\n::1 LocalHost ip6 # x\n\nnonsense here\nfe80::1%lo0 ll\n1.2.3.4\n"
    found = parse_hosts(text)
    assert found["localhost"] == tuple(addresses("127.0.0.1", "::1"))
    assert found["ll"] == tuple(addresses("fe80::1"))
    assert set(found) == {"localhost", "ip6", "ll"}


def test_reads_nameservers_as_libc_does() -> None:
    text = "search x\nnameserver 192.0.2.1\nnameserver nonsense\nnameserver fe80::1%eth0\n"
    assert parse_nameservers(text) == ("192.0.2.1", "fe80::1%eth0")
    assert parse_nameservers("") == ("127.0.0.1",)


def test_a_changed_file_is_read_again_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    servers = Nameservers(path)
    assert servers.get() == ("127.0.0.1",)
    path.write_text("nameserver 192.0.2.1\n")
    assert servers.get() == ("192.0.2.1",)
    other = tmp_path / "new"
    other.write_text("nameserver 192.0.2.2\n")
    other.rename(path)
    assert servers.get() == ("192.0.2.2",)
    path.unlink()
    assert servers.get() == ("127.0.0.1",)


def test_an_answered_name_is_the_runs_own_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, (address,) = AnsweredNames(), addresses("192.0.2.1")
    names.remember("run1", "a.test", [address], 0)
    assert names.name_of("run1", address) == "a.test"
    assert names.name_of("run2", address) is None
    names.remember("run1", "b.test", [address], 60)
    assert names.name_of("run1", address) == "b.test"
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert names.name_of("run1", address) is None


@given(st.text(max_size=300))
def test_no_text_breaks_the_readers_of_host_files(text: str) -> None:
    parse_hosts(text)
    assert 0 < len(parse_nameservers(text)) <= hostdns.NAMESERVERS_LIMIT


# -- whether a run can rely on it


def problem(*explicit: bool, stopping: bool = False) -> str:
    async def main() -> str:
        shared = Shared(*[None] * 5)  # type: ignore[list-item]
        front = Front(shared)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in explicit]
        for sock, kind in zip(sockets, explicit, strict=True):
            front.listen(sock, explicit=kind)
        if stopping:
            front.stop_accepting()
        told = front.problem()
        front.stop_accepting()
        for sock in sockets:
            sock.close()
        return told

    return run(main())


def test_a_front_with_its_listeners_has_no_problem() -> None:
    assert problem(False, True) == ""


def test_a_front_that_stops_or_has_no_transparent_listener_says_so() -> None:
    assert "stopping" in problem(False, True, stopping=True)
    assert "no transparent listener" in problem(True)


def test_a_mode_is_the_last_that_a_run_was_told() -> None:
    modes = Modes()
    assert not modes.enforced("run1")
    modes.note("run1", Mode.ENFORCE)
    assert modes.enforced("run1") and not modes.enforced("run2")
    modes.note("run1", Mode.OBSERVE)
    assert not modes.enforced("run1")


# -- the document


@pytest.mark.parametrize(
    "row",
    [
        f"| ClientHello, request head | {sniff.HELLO_LIMIT >> 10} KiB each |",
        f"| ClientHello, request head | {sniff.HEAD_LIMIT >> 10} KiB each |",
        f"| addresses of a name | the first {dialling.ADDRESSES_LIMIT} |",
        f"| names in resolution, of one run | {dialling.RESOLVING_PER_RUN} | 502 |",
        f"| resolving a name | {dialling.RESOLVE_SECONDS:g} s | 504 |",
        f"of one run | {forwarder.IN_FLIGHT}, {forwarder.IN_FLIGHT_PER_RUN} | `REFUSED`",
        f"of one run | {forwarder.QUERIES_PER_SECOND:g} a second, "
        f"bursts of {2 * forwarder.QUERIES_PER_SECOND:g} |",
        f"of one run | {Proxy().max_connections}, {Proxy().max_connections_per_run} | reset",
        f"silent for {connection.SILENT_SECONDS} s",
    ],
)
def test_the_document_names_the_limits_that_hold(row: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "proxy.md").read_text()
    assert row in " ".join(text.split()) or row in text


# -- who it is


class Table:
    def __init__(self, **runs: int) -> None:
        self._runs = {
            cgroup: Run(id=name, agent="a", user="u", uid=1) for name, cgroup in runs.items()
        }

    def by_cgroup(self, cgroup_id: int) -> Run | None:
        return self._runs.get(cgroup_id)


class Diag:
    def __init__(self, answer: SocketOwner | None | Exception, *candidates: SocketOwner) -> None:
        self._answer = answer
        self.candidates = candidates
        self.searches = 0

    def connected(self, *_: object) -> tuple[SocketOwner, ...]:
        self.searches += 1
        return self.candidates

    def owner(self, *_: object) -> SocketOwner | None:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def who(answer: SocketOwner | None | Exception, tmp_path: Path, **more: Any) -> Client | Stranger:
    known = Identify(
        Table(run1=7, **more.pop("runs", {})),
        Diag(answer),  # type: ignore[arg-type]
        explicit_users={1000: "dev"},
        root=tmp_path,
        slice_="agents",
    )
    return known.tcp(socket.AF_INET, ("127.0.0.1", 1), ("127.0.0.1", 2), **more)


def test_a_socket_of_a_runs_cgroup_is_that_runs(tmp_path: Path) -> None:
    assert who(SocketOwner(1000, 5, 7), tmp_path) == Client("run1", 1000)


def test_a_socket_below_a_runs_cgroup_is_that_runs(tmp_path: Path) -> None:
    inner = tmp_path / "agents/run/inner/deep"
    inner.mkdir(parents=True)
    of_run = (tmp_path / "agents/run").stat().st_ino
    owner = SocketOwner(1000, 5, inner.stat().st_ino)
    assert who(owner, tmp_path, runs={"outer": of_run}) == Client("outer", 1000)


@pytest.mark.parametrize(
    "answer", [None, SockDiagError("x"), ValueError("x"), SocketOwner(1000, 5, 8)]
)
def test_everybody_else_is_a_stranger(answer: Any, tmp_path: Path) -> None:
    assert isinstance(who(answer, tmp_path), Stranger)


def test_a_user_of_the_config_is_known_at_the_explicit_port_alone(tmp_path: Path) -> None:
    assert who(SocketOwner(1000, 5, 8), tmp_path, explicit=True) == Client("user/dev", 1000)
    assert isinstance(who(SocketOwner(1001, 5, 8), tmp_path, explicit=True), Stranger)
    assert isinstance(who(SocketOwner(-1, 0, 8), tmp_path, explicit=True), Stranger)


def test_inside_a_run_that_is_not_known_that_user_is_a_stranger(tmp_path: Path) -> None:
    unknown = tmp_path / "agents/unknown"
    unknown.mkdir(parents=True)
    owner = SocketOwner(1000, 5, unknown.stat().st_ino)
    assert isinstance(who(owner, tmp_path, explicit=True), Stranger)


def searching(*candidates: SocketOwner) -> Identify:
    return Identify(Table(run1=7, run2=8), Diag(None, *candidates))  # type: ignore[arg-type]


def found(known: Identify, **more: Any) -> Client | Stranger:
    return known.tcp(socket.AF_INET, ("10.0.0.1", 1), ("10.0.0.2", 443), **more)


def test_a_client_whose_port_was_changed_is_the_one_socket_with_that_destination() -> None:
    assert found(searching(SocketOwner(1000, 5, 7))) == Client("run1", 1000)


def test_of_two_runs_with_that_destination_neither_is_guessed() -> None:
    both = SocketOwner(1000, 5, 7), SocketOwner(1000, 6, 8)
    assert isinstance(found(searching(*both)), Stranger)


def test_a_socket_whose_connection_is_held_already_is_not_the_one() -> None:
    known = searching(SocketOwner(1000, 5, 7), SocketOwner(1000, 6, 8))
    other = Client("run2", 1000, inode=6)
    known.hold(other)
    assert found(known) == Client("run1", 1000)
    known.release(other)
    assert isinstance(found(known), Stranger)


def test_an_ungoverned_socket_with_that_destination_is_not_the_one() -> None:
    """The proxy's own connection to the origin is one of these."""
    assert found(searching(SocketOwner(1000, 5, 7), SocketOwner(0, 6, 99))) == Client("run1", 1000)


def test_a_run_that_is_not_known_may_be_the_one(tmp_path: Path) -> None:
    unknown = tmp_path / "agents/unknown"
    unknown.mkdir(parents=True)
    owners = SocketOwner(1000, 5, 7), SocketOwner(1000, 6, unknown.stat().st_ino)
    diag = Diag(None, *owners)
    known = Identify(Table(run1=7), diag, root=tmp_path, slice_="agents")  # type: ignore[arg-type]
    assert isinstance(found(known), Stranger)


def test_a_client_that_left_is_not_searched_a_substitute_for() -> None:
    known = searching(SocketOwner(1000, 5, 7))
    assert isinstance(found(known, established=lambda: False), Stranger)


def test_searches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    diag = Diag(None)
    known = Identify(Table(), diag)  # type: ignore[arg-type]
    still = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: still)
    for _ in range(1000):
        assert isinstance(found(known), Stranger)
    assert diag.searches == 2 * identify.SEARCHES_PER_SECOND


def test_the_search_for_cgroups_that_are_no_runs_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []

    def find(wanted: int, *_: object) -> None:
        walks.append(wanted)

    monkeypatch.setattr(identify.cgroup, "find_by_id", find)
    known = Identify(Table(), Diag(SocketOwner(1, 5, 8)))  # type: ignore[arg-type]
    for _ in range(50):
        known.tcp(socket.AF_INET, ("127.0.0.1", 1), ("127.0.0.1", 2))
    assert walks == [8]


# -- the gateway


def test_nobody_at_the_gateways_socket_is_a_denial_in_time(tmp_path: Path) -> None:
    gateway = Gateway(socket=tmp_path / "enforce", seconds=0.3)
    with pytest.raises(GatewayAway) as away:
        run(gateway.decide("run1", Action(Kind.NET_CONNECT, "a:1")))
    assert not away.value.decision.permits
    assert away.value.decision.rule == "<gateway-unreachable>"


@pytest.mark.parametrize("answer", [b"", b"\0", b"{}\0", b"nonsense\0", b'{"parameters":[]}\0'])
def test_what_is_no_answer_is_a_denial(tmp_path: Path, answer: bytes) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\0")
            writer.write(answer)
            await writer.drain()
            writer.close()

        path = tmp_path / "enforce"
        async with await asyncio.start_unix_server(serve, path):
            gateway = Gateway(socket=path, seconds=1)
            with pytest.raises(GatewayAway):
                await gateway.decide("run1", Action(Kind.NET_CONNECT, "a:1"))
            await gateway.close()

    run(main())


def test_a_stuck_call_does_not_hold_up_the_next(tmp_path: Path) -> None:
    """The first connection is given up with its late answer; the next call has its own."""

    async def main() -> str:
        calls = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal calls
            await reader.readuntil(b"\0")
            calls += 1
            if calls == 1:
                await asyncio.sleep(5)
            decision = deny(f"call {calls}", rule="r").as_json()
            writer.write(json.dumps({"parameters": {"decision": decision}}).encode() + b"\0")

        path = tmp_path / "enforce"
        server = await asyncio.start_unix_server(serve, path)
        gateway = Gateway(socket=path, seconds=0.3)
        with pytest.raises(GatewayAway, match="within 0.3 s"):
            await gateway.decide("run1", Action(Kind.NET_CONNECT, "a:1"))
        second = await gateway.decide("run1", Action(Kind.NET_CONNECT, "b:1"))
        await gateway.close()
        server.close()
        return second.reason

    assert run(main()) == "call 2"


def test_equal_refusals_become_one_report_with_a_count() -> None:
    reports: list[Report] = []
    refusals = Refusals(reports.append)
    for target in ("a:1", "a:1", "b:1", "a:1"):
        refusals.refuse(deny("no", rule="r"), Kind.NET_CONNECT, target, run="run1")
    assert [(r.target, r.count) for r in reports] == [("a:1", 1), ("b:1", 1)]
    refusals.flush()
    assert [(r.target, r.count) for r in reports[2:]] == [("a:1", 2)]
    refusals.flush()
    assert len(reports) == 3 and sum(r.count for r in reports) == 4
