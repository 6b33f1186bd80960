"""The DNS forwarder behind a real redirect: decided by name first, and a denied name leaves nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.host.front_world import PEER4, PEER6, RUN, World, decision, world
from tests.host.redirect_lab import run_json


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with world("[proxy]\ndecide_seconds = 1.0\n") as made:
        yield made


@pytest.fixture
def w(shared: World) -> World:
    shared.fresh()
    shared.peer.mute = False
    shared.peer.zone = {
        ("pypi.test", "A"): ["192.0.2.10", "192.0.2.11"],
        ("pypi.test", "AAAA"): ["2001:db8::10"],
        ("pypi.test", "TXT"): ['"some text"'],
        ("_http._tcp.pypi.test", "SRV"): ["0 0 80 pypi.test."],
        ("pypi.test", "HTTPS"): ["1 . alpn=h2"],
        ("big.test", "A"): [f"198.51.100.{i}" for i in range(1, 200)],
        ("opaque.test", "A"): [PEER4],
    }
    return shared


ASK = """
import json, sys
import dns.message, dns.query, dns.rdatatype, dns.flags, dns.rcode
name, kind, where, options = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
query = dns.message.make_query(name, kind, use_edns=0 if "edns" in options else None)
send = dns.query.tcp if "tcp" in options else dns.query.udp
try:
    answer = send(query, where, timeout=7)
except Exception as e:
    print(json.dumps({"error": type(e).__name__}))
    raise SystemExit
edes = [[int(o.code), o.text] for o in answer.options if o.otype == 15]
print(json.dumps({
    "rcode": dns.rcode.to_text(answer.rcode()),
    "records": [[r.ttl, dns.rdatatype.to_text(r.rdtype), sorted(str(x) for x in r)] for r in answer.answer],
    "truncated": bool(answer.flags & dns.flags.TC), "edes": edes,
    "question": answer.question[0].to_text() if answer.question else "",
}))
"""


def ask(w: World, name: str, kind: str = "A", *options: str, where: str = PEER4) -> dict[str, Any]:
    return dict(json.loads(w.python(ASK, name, kind, where, *options)))


def test_answers_an_allowed_name_as_the_hosts_resolver_does(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    told = ask(w, "pypi.test")
    assert told["rcode"] == "NOERROR"
    assert told["records"] == [[77, "A", ["192.0.2.10", "192.0.2.11"]]]
    assert w.peer.queries == [("pypi.test", "A")]


def test_a_denied_name_is_refused_and_no_query_leaves(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    began = time.monotonic()
    told = ask(w, "secret-data.evil.test", "A", "edns")
    assert told["rcode"] == "REFUSED" and told["records"] == []
    assert told["edes"] == [[18, "the test says deny [test/deny]"]]
    assert time.monotonic() - began < 1
    assert w.peer.queries == []
    (asked,) = w.gateway.asked
    assert asked["run"] == RUN and asked["final"]
    assert asked["action"]["kind"] == "dns.query"
    assert asked["action"]["target"] == "secret-data.evil.test"
    assert asked["action"]["attributes"]["qtype"] == "A"


def test_a_client_without_edns_gets_no_edns(w: World) -> None:
    assert ask(w, "evil.test")["edes"] == []


@pytest.mark.parametrize("where", [PEER4, PEER6, "127.0.0.53", "192.0.2.53", "127.0.0.1"])
def test_whatever_server_a_run_asks_it_asks_the_forwarder(w: World, where: str) -> None:
    w.gateway.rules["pypi.test"] = decision()
    assert ask(w, "pypi.test", "AAAA", where=where)["records"] == [[77, "AAAA", ["2001:db8::10"]]]


@pytest.mark.parametrize("where", [PEER4, PEER6])
def test_tcp_works_alike(w: World, where: str) -> None:
    w.gateway.rules["pypi.test"] = decision()
    assert ask(w, "pypi.test", "A", "tcp", where=where)["rcode"] == "NOERROR"
    assert ask(w, "evil.test", "A", "tcp", where=where)["rcode"] == "REFUSED"
    assert w.peer.queries == [("pypi.test", "A")]


def test_libc_resolves_through_it(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    script = (
        "import socket,sys; print(sorted({a[4][0] for a in socket.getaddrinfo(sys.argv[1], 1)}))"
    )
    assert w.python(script, "pypi.test") == "['192.0.2.10', '192.0.2.11', '2001:db8::10']\n"


def test_the_letter_case_of_a_query_does_not_travel_on_but_comes_back(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    told = ask(w, "PyPI.TeSt")
    assert told["question"].startswith("PyPI.TeSt. ") and told["records"]
    assert w.peer.queries == [("pypi.test", "A")]
    assert w.gateway.asked[0]["action"]["target"] == "pypi.test"


def test_the_hosts_file_comes_first(w: World) -> None:
    w.gateway.rules.update({"allowed.test": decision(), "localhost": decision()})
    assert ask(w, "allowed.test")["records"] == [[10, "A", [PEER4]]]
    assert ask(w, "allowed.test", "AAAA")["records"] == [[10, "AAAA", [PEER6]]]
    assert ask(w, "localhost")["records"] == [[10, "A", ["127.0.0.1"]]]
    assert w.peer.queries == []


def test_the_hosts_file_does_not_answer_for_denied_names(w: World) -> None:
    assert ask(w, "allowed.test")["rcode"] == "REFUSED"


def test_a_changed_hosts_file_and_resolver_are_noticed(w: World) -> None:
    w.gateway.rules["new.test"] = decision()
    assert ask(w, "new.test")["rcode"] == "NXDOMAIN"
    before = w.lab.path("/etc/hosts").read_text()
    w.write("/etc/hosts", before + "192.0.2.77 new.test\n")
    try:
        assert ask(w, "new.test")["records"] == [[10, "A", ["192.0.2.77"]]]
    finally:
        w.write("/etc/hosts", before)
    w.write("/etc/resolv.conf", f"nameserver 10.77.0.98\nnameserver {PEER6}\n")
    try:
        w.gateway.rules["pypi.test"] = decision()
        assert ask(w, "pypi.test")["rcode"] == "NOERROR"
    finally:
        w.write("/etc/resolv.conf", f"nameserver {PEER4}\n")


def test_other_types_go_to_the_hosts_resolver_by_name(w: World) -> None:
    w.gateway.rules.update({"pypi.test": decision(), "_http._tcp.pypi.test": decision()})
    assert ask(w, "pypi.test", "TXT")["records"] == [[77, "TXT", ['"some text"']]]
    assert ask(w, "_http._tcp.pypi.test", "SRV")["records"] == [[77, "SRV", ["0 0 80 pypi.test."]]]
    assert ask(w, "evil.test", "TXT")["rcode"] == "REFUSED"
    assert len(w.peer.queries) == 2


@pytest.mark.parametrize("kind", ["HTTPS", "SVCB"])
def test_keys_for_encrypted_hellos_are_never_handed_out(w: World, kind: str) -> None:
    w.gateway.rules["pypi.test"] = decision()
    told = ask(w, "pypi.test", kind)
    assert (told["rcode"], told["records"]) == ("NOERROR", []) and w.peer.queries == []


@pytest.mark.parametrize("kind", ["ANY", "AXFR", "TYPE250"])
def test_what_is_no_lookup_is_not_done(w: World, kind: str) -> None:
    w.gateway.rules["pypi.test"] = decision()
    query = (
        "import socket, dns.message, dns.rdatatype\n"
        "q = bytearray(dns.message.make_query('pypi.test', 'A').to_wire())\n"
        f"q[-4:-2] = int(dns.rdatatype.from_text('{kind}')).to_bytes(2, 'big')\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
        f"s.sendto(q, ('{PEER4}', 53)); print(s.recv(512)[3] & 15)\n"
    )
    assert w.python(query) == "4\n"
    assert w.peer.queries == []


def test_a_large_answer_is_cut_over_udp_and_whole_over_tcp(w: World) -> None:
    w.gateway.rules["big.test"] = decision()
    cut = ask(w, "big.test")
    assert cut["truncated"] and cut["records"] == []
    whole = ask(w, "big.test", "A", "tcp")
    assert len(whole["records"][0][2]) == 199


def test_a_name_that_does_not_exist_is_told_so(w: World) -> None:
    w.gateway.rules["nowhere.test"] = decision()
    assert ask(w, "nowhere.test")["rcode"] == "NXDOMAIN"


def test_a_silent_resolver_is_a_servfail_in_time(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    w.peer.mute = True
    told = ask(w, "pypi.test", "A", "edns")
    assert told["rcode"] == "SERVFAIL" and told["edes"][0][0] == 22
    assert PEER4 in told["edes"][0][1]


def test_no_resolver_at_all_is_a_servfail(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    w.write("/etc/resolv.conf", "nameserver 192.0.2.254\n")
    try:
        assert ask(w, "pypi.test")["rcode"] == "SERVFAIL"
    finally:
        w.write("/etc/resolv.conf", f"nameserver {PEER4}\n")


def test_without_a_gateway_every_name_is_refused(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    w.gateway.stop()
    try:
        told = ask(w, "pypi.test", "A", "edns")
    finally:
        w.gateway.start()
    assert told["rcode"] == "REFUSED" and "gateway" in told["edes"][0][1]
    assert w.peer.queries == []
    assert w.gateway.reported("refusal")[0]["rule"] == "<gateway-unreachable>"


def test_an_unknown_run_is_refused_and_recorded(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    told = json.loads(w.python(ASK, "pypi.test", "A", PEER4, run="stranger"))
    assert told["rcode"] == "REFUSED" and w.gateway.asked == []
    refused = w.gateway.reported("refusal")[0]
    assert (refused["rule"], refused["kind"], refused["target"]) == (
        "<unknown-run>",
        "dns.query",
        "pypi.test",
    )


def test_an_ungoverned_user_asks_the_resolver_itself(w: World) -> None:
    done = w.lab.run("/usr/bin/python3", "-c", ASK, "pypi.test", "A", PEER4)
    assert json.loads(done.stdout)["rcode"] == "NOERROR"
    assert w.gateway.asked == [] and w.peer.queries == [("pypi.test", "A")]


RAW = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.6)
s.sendto(bytes.fromhex(sys.argv[1]), ("10.77.0.2", 53))
try: print(s.recv(4096).hex())
except TimeoutError: print("nothing")
"""
HEAD = "123401000001000000000000"
NAME = "0470797069047465737400"
FORMERR, NOTIMP, REFUSED = 1, 4, 5


@pytest.mark.parametrize(
    ("packet", "rcode"),
    [
        ("", None),
        ("1234", None),
        ("12348180000100000000" "0000" + NAME + "00010001", None),
        (HEAD, FORMERR),
        (HEAD + NAME, FORMERR),
        (HEAD + NAME + "00010001" + "00", FORMERR),
        (HEAD + "ff" * 20, FORMERR),
        (HEAD + "c00c" + "00010001", FORMERR),
        ("1234" "0100" "0002" "0000" "0000" "0000" + (NAME + "00010001") * 2, FORMERR),
        ("1234" "0100" "0000" "0000" "0000" "0000", FORMERR),
        ("1234" "0100" "0001" "0001" "0000" "0000" + NAME + "00010001" * 1, FORMERR),
        ("1234" "2800" "0001" "0000" "0000" "0000" + NAME + "00010001", NOTIMP),
        (HEAD + NAME + "00010003", REFUSED),
        (HEAD + "00" + "00010001", REFUSED),
        (HEAD + "03" "612e62" "04" "74657374" "00" "00010001", REFUSED),
        (HEAD + "03" "610062" "04" "74657374" "00" "00010001", REFUSED),
        (HEAD + "03" "c3bc62" "04" "74657374" "00" "00010001", REFUSED),
        (HEAD + "03" "313237" "01" "31" "00" "00010001", REFUSED),
    ],
)  # fmt: skip
def test_a_packet_that_is_no_plain_query_is_not_decided(
    w: World, packet: str, rcode: int | None
) -> None:
    w.gateway.rules["pypi.test"] = decision()
    answer = w.python(RAW, packet).strip()
    if rcode is None:
        assert answer == "nothing"
    else:
        assert answer[:4] == "1234" and int(answer[6:8], 16) & 15 == rcode
    assert w.gateway.asked == [] and w.peer.queries == []


def test_the_same_query_written_properly_is_answered(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    answer = w.python(RAW, HEAD + NAME + "00010001").strip()
    assert answer[:4] == "1234" and int(answer[6:8], 16) & 15 == 0


def test_an_opaque_connection_is_decided_by_the_name_that_was_asked_for(w: World) -> None:
    """ssh to a name: the bytes say no name, our resolver said which one has this address."""
    w.gateway.rules.update({"opaque.test": decision(), PEER4: decision()})
    script = (
        "import socket, sys\n"
        "s = socket.create_connection((sys.argv[1], 22), 5)\n"
        "s.sendall(b'SSH-2.0-x\\r\\n'); print(s.recv(9))\n"
    )
    assert w.python(script, "opaque.test") == "b'220 speak'\n"
    (asked,) = [a["action"] for a in w.gateway.asked if a["action"]["kind"] == "net.connect"]
    assert asked["target"] == f"{PEER4}:22"
    assert asked["attributes"]["answered"] == "opaque.test"
    assert asked["attributes"]["addresses"] == [PEER4]


def test_a_name_that_another_run_asked_for_says_nothing_of_this_one(w: World) -> None:
    for run in ("second", "third"):
        w.gateway.set_run(run_json(w.lab, run, state="running"))
    w.peer.zone["opaque.test", "AAAA"] = [PEER6]
    w.gateway.rules.update({"opaque.test": decision(), PEER6: decision()})
    w.python("import socket; socket.getaddrinfo('opaque.test', 1)", run="second")
    connect = (
        "import socket\n"
        f"s = socket.create_connection(('{PEER6}', 22), 5)\n"
        "s.sendall(b'SSH-2.0-x\\r\\n'); print(s.recv(9))\n"
    )
    assert w.python(connect, run="third") == w.python(connect, run="second") == "b'220 speak'\n"
    asked = [a for a in w.gateway.asked if a["action"]["kind"] == "net.connect"]
    assert [(a["run"], a["action"]["attributes"].get("answered")) for a in asked] == [
        ("third", None),
        ("second", "opaque.test"),
    ]


def test_a_silent_tcp_client_does_not_hold_others_up(w: World) -> None:
    w.gateway.rules["pypi.test"] = decision()
    hold = (
        "import socket, time\n"
        f"held = [socket.create_connection(('{PEER4}', 53)) for _ in range(40)]\n"
        "time.sleep(2)\n"
    )
    holding = w.lab.start_governed("stranger", "/usr/bin/python3", "-c", hold)
    time.sleep(0.3)
    assert ask(w, "pypi.test", "A", "tcp")["rcode"] == "NOERROR"
    holding.wait(10)


def test_every_line_that_is_logged_is_no_traceback(w: World) -> None:
    assert "Traceback" not in w.log.read_text(), w.log.read_text()
