"""What is seen of requests inside TLS: real clients, real libraries, and what is said of those that cannot be seen."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aa.ebpf import capability, libbpf
from aa.ebpf.libbpf import Ring
from aa.ebpf.tls import records
from aa.ebpf.tls.probes import Probes
from aa.model import Kind, Layer, RecordType, Report
from tests.host.ebpf_gateway import Gateway
from tests.host.ebpf_world import OBJECTS, PRELUDE, SERVER4, World, eventually, ids, sh
from tests.host.test_ebpf_service import READY_SECONDS, Running

PORT = 4443
SINK = 4445
"""A server that reads and never answers."""
SECONDS = 10.0
BODY = 3000
QUERY = "token=very-secret"

SERVE = """
import http.server, ssl, threading
certificate, key, *ports = sys.argv[1:]
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        n = int(self.headers.get("content-length") or 0)
        self.rfile.read(n)
        self.send_response(200)
        self.send_header("Content-Length", "3000")
        self.end_headers()
        self.wfile.write(b"x" * 3000)
    do_POST = do_GET
    def log_message(self, *a):
        pass
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
for port in ports:
    server = http.server.ThreadingHTTPServer(("10.78.0.2", int(port)), Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever).start()
def swallow(sink):
    while True:
        try:
            client, _ = sink.accept()
            while client.recv(1 << 16):
                pass
        except OSError:
            pass
sink = context.wrap_socket(socket.create_server(("10.78.0.2", 4445)), server_side=True)
threading.Thread(target=swallow, args=(sink,)).start()
print("serving")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World.make("t")
    directory = tmp_path_factory.mktemp("tls")
    sh(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-days", "2", "-subj", "/CN=site.test", "-addext"),
        *("subjectAltName=DNS:site.test,IP:10.78.0.2",),
        *("-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")),
    )
    ports = (str(PORT), "443")
    pem = (str(directory / "cert.pem"), str(directory / "key.pem"))
    with world.background(world.outside, SERVE, *pem, *ports):
        world.pem = directory
        yield world
    world.close()


@pytest.fixture(scope="module")
def gateway(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """With the service behind it."""
    gateway = Gateway(tmp_path_factory.mktemp("gateway") / "enforce")
    gateway.open()
    running = Running(world, gateway)
    try:
        assert eventually(lambda: gateway.rung == "cgroup", seconds=READY_SECONDS)
        yield gateway
    finally:
        log = running.stop()
        gateway.close()
        assert "Traceback" not in log, log


@pytest.fixture
def run(world: World, gateway: Gateway, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The cgroup of a run that the kernel layer has confirmed; its id is the test's name."""
    id = request.node.name
    cgroup = world.run_dir(world.local, f"aa-agent-{ids(world.local)}-{abs(hash(id))}.service")
    told = gateway.starting(id, str(cgroup.relative_to(world.root)), ids(cgroup))
    assert eventually(lambda: id in gateway.confirmed, seconds=READY_SECONDS)
    assert gateway.confirmed[id] == (True, "")
    gateway.reports.clear()
    yield cgroup
    assert told.id == id


def requests(gateway: Gateway, **wanted: Any) -> list[Report]:
    """Reports of requests whose attributes have these values."""
    return [
        r
        for r in list(gateway.reports)
        if r.kind is Kind.HTTP_REQUEST
        and r.target != "unmeasured"
        and all(r.attributes.get(k) == v for k, v in wanted.items())
    ]


def unmeasured(gateway: Gateway, reason: str) -> list[Report]:
    return [r for r in list(gateway.reports) if r.attributes.get("unmeasured") == reason]


def one(what: Callable[[], list[Report]]) -> Report:
    found = eventually(what, seconds=SECONDS)
    assert len(found) == 1, found
    return found[0]


def url(path: str, port: int = PORT) -> str:
    return f"https://{SERVER4}:{port}{path}?{QUERY}"


def test_sees_a_request_of_curl_and_no_query_of_it(
    world: World, gateway: Gateway, run: Path
) -> None:
    world.do(run, "curl", "-sk", "--http1.1", "-H", "Host: site.test", "-H", "X-Secret: geheim",
             "-o", "/dev/null", url("/curl/path"))  # fmt: skip
    seen = one(lambda: requests(gateway, path="/curl/path"))
    assert seen.target == "https://site.test/curl/path"
    assert (seen.type, seen.layer) == (RecordType.OBSERVED, Layer.KERNEL)
    about = seen.attributes
    assert about["source"] == "tls-probe"
    assert about["method"] == "GET"
    assert about["host"] == "site.test"
    assert about["comm"] == "curl"
    assert Path(about["library"]).name == "libssl.so.3"
    assert (about["peer"], about["peer_exact"]) == (f"{SERVER4}:{PORT}", False)
    assert 80 < about["bytes_out"] < 400
    assert BODY < about["bytes_in"] < BODY + 300
    everything = str([r.as_json() for r in gateway.reports if r.kind is Kind.HTTP_REQUEST])
    assert "very-secret" not in everything and "geheim" not in everything


def test_knows_the_peer_where_the_library_knows_the_descriptor(
    world: World, gateway: Gateway, run: Path
) -> None:
    world.python(run, f"""
        import ssl, http.client
        context = ssl._create_unverified_context()
        c = http.client.HTTPSConnection("{SERVER4}", {PORT}, context=context)
        for path in ("/first", "/second"):
            c.request("POST", path, b"y" * 20000)
            c.getresponse().read()
    """)  # fmt: skip
    for path in ("/first", "/second"):
        about = one(lambda path=path: requests(gateway, path=path)).attributes
        assert (about["peer"], about["peer_exact"]) == (f"{SERVER4}:{PORT}", True)
        assert about["method"] == "POST"
        assert about["host"] == SERVER4
        assert 20000 < about["bytes_out"] < 20500
        assert BODY < about["bytes_in"] < BODY + 300
    assert not unmeasured(gateway, "before-attach")


def test_sees_requests_of_node_fetch(world: World, gateway: Gateway, run: Path) -> None:
    code = f"fetch('https://{SERVER4}:{PORT}/node?a=b').then(r => r.text())"
    world.do(run, "env", "NODE_TLS_REJECT_UNAUTHORIZED=0", "node", "-e", code)
    about = one(lambda: requests(gateway, path="/node")).attributes
    assert Path(about["library"]).name == "node"
    assert about["host"] == SERVER4
    assert BODY < about["bytes_in"] < BODY + 300


def test_sees_requests_of_git_through_gnutls(world: World, gateway: Gateway, run: Path) -> None:
    world.do(run, "git", "-c", "http.sslVerify=false", "ls-remote",
             f"https://{SERVER4}:{PORT}/repo.git", check=False)  # fmt: skip
    about = one(lambda: requests(gateway, path="/repo.git/info/refs")).attributes
    assert Path(about["library"]).name.startswith("libgnutls.so.30")
    assert (about["host"], about["method"]) == (SERVER4, "GET")
    assert BODY < about["bytes_in"] < BODY + 400


def test_finds_a_library_that_lies_anywhere_under_any_name(
    world: World, gateway: Gateway, run: Path, tmp_path: Path
) -> None:
    """A client with a copy of OpenSSL of its own, mapped after its start."""
    ssl = next(Path("/usr/lib").glob("*/libssl.so.3"))
    own = tmp_path / "strange name.so"
    shutil.copy(ssl, own)
    world.python(run, f"""
        import ctypes
        L = ctypes.CDLL({str(own)!r})
        for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(L, name).restype = ctypes.c_void_p
        s = tcp("{SERVER4}", {PORT})
        s.setblocking(True)
        time.sleep(2)  # the library is looked for after the connection
        context = ctypes.c_void_p(L.SSL_CTX_new(ctypes.c_void_p(L.TLS_client_method())))
        ssl = ctypes.c_void_p(L.SSL_new(context))
        L.SSL_set_fd(ssl, s.fileno())
        assert L.SSL_connect(ssl) == 1
        head = b"GET /copied HTTP/1.1\\r\\nHost: site.test\\r\\n\\r\\n"
        assert L.SSL_write(ssl, head, len(head)) == len(head)
        L.SSL_free(ssl)
    """)  # fmt: skip
    about = one(lambda: requests(gateway, path="/copied")).attributes
    assert about["library"] == str(own)
    assert about["peer_exact"] is True


OWN_OPENSSL = """
import ctypes
def request(path, *, host="10.78.0.2", port=4443):
    for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
        getattr(L, name).restype = ctypes.c_void_p
    s = tcp(host, port, 10)
    s.setblocking(True)
    context = ctypes.c_void_p(L.SSL_CTX_new(ctypes.c_void_p(L.TLS_client_method())))
    ssl = ctypes.c_void_p(L.SSL_new(context))
    L.SSL_set_fd(ssl, s.fileno())
    assert L.SSL_connect(ssl) == 1
    head = b"GET " + path + b" HTTP/1.1\\r\\nHost: site.test\\r\\n\\r\\n"
    assert L.SSL_write(ssl, head, len(head)) == len(head)
    L.SSL_free(ssl)
"""


def own_openssl(directory: Path) -> Path:
    """A copy of OpenSSL that nobody has mapped yet."""
    own = directory / "libssl-own.so"
    shutil.copy(next(Path("/usr/lib").glob("*/libssl.so.3")), own)
    return own


def test_a_library_gets_its_probes_when_it_is_mapped(
    world: World, gateway: Gateway, run: Path, tmp_path: Path
) -> None:
    """Long after the start, and not for a connection: an event of the mapping leads to it."""
    own = own_openssl(tmp_path)

    def has_probes() -> bool:
        return str(own) in gateway.statuses[-1][1]["tls"]["libraries"]

    code = f"""
{OWN_OPENSSL}
time.sleep(3)  # the looks after the start are over
print("mapping"); sys.stdout.flush()
L = ctypes.CDLL({str(own)!r})
sys.stdin.readline()
request(b"/mapped")
sys.stdin.readline()
"""
    with world.background(run, code, netns=world.client) as client:
        assert client.stdin is not None
        assert eventually(has_probes, seconds=5.0), "before the next look at all processes"
        client.stdin.write("go\n")
        client.stdin.flush()
        about = one(lambda: requests(gateway, path="/mapped")).attributes
    assert about["library"] == str(own) and about["peer_exact"] is True
    assert not unmeasured(gateway, "before-attach")


def test_finds_a_library_in_a_root_of_its_own(
    world: World, gateway: Gateway, run: Path, tmp_path: Path
) -> None:
    """As in a container: the path leads nowhere outside of the mount namespace."""
    place = tmp_path / "only-here"
    place.mkdir()
    script = f"""
mount -t tmpfs tmpfs {place} && cp /usr/lib/*/libssl.so.3 {place}/libssl.so.3 || exit 1
exec "$@"
"""
    code = f"""
{OWN_OPENSSL}
L = ctypes.CDLL({str(place / "libssl.so.3")!r})
time.sleep(2)
request(b"/contained")
"""
    world.do(run, "unshare", "--mount", "sh", "-c", script, "sh",
             "/usr/bin/python3", "-I", "-S", "-c", PRELUDE + code)  # fmt: skip
    about = one(lambda: requests(gateway, path="/contained")).attributes
    assert about["library"] == str(place / "libssl.so.3")
    assert not list(place.iterdir())


def test_sees_requests_of_a_python_in_a_virtual_environment(
    world: World, gateway: Gateway, run: Path, tmp_path: Path
) -> None:
    """With its library beside it, as wheels bring it."""
    sh("/usr/bin/python3", "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    beside = tmp_path / "venv" / "lib"
    own = own_openssl(beside)
    code = f"import http.client, ssl; c = http.client.HTTPSConnection('{SERVER4}', {PORT}, context=ssl._create_unverified_context()); import time; time.sleep(2); c.request('GET', '/venv'); c.getresponse().read()"
    world.do(run, "env", f"LD_PRELOAD={own}", str(tmp_path / "venv/bin/python3"), "-c", code)
    about = one(lambda: requests(gateway, path="/venv")).attributes
    assert about["library"] == str(own)


def test_tells_two_processes_with_one_library_apart(
    world: World, gateway: Gateway, run: Path
) -> None:
    clients = [
        subprocess.Popen(
            world.command(
                run,
                world.client,
                "curl",
                "-sk",
                "--http1.1",
                "-o",
                "/dev/null",
                url(f"/{name}"),
                "-o",
                "/dev/null",
                url(f"/{name}"),
            )  # fmt: skip
        )
        for name in ("a", "b")
    ]
    for client in clients:
        assert client.wait(SECONDS) == 0
    for client, name in zip(clients, ("a", "b"), strict=True):
        found = eventually(
            lambda name=name: (r := requests(gateway, path=f"/{name}")) and len(r) == 2 and r,
            seconds=SECONDS,
        )
        assert found, requests(gateway)
        assert {r.attributes["pid"] for r in found} == {client.pid}


def test_says_nothing_of_programs_outside_every_run(
    world: World, gateway: Gateway, run: Path
) -> None:
    world.do(world.outside, "curl", "-sk", "-o", "/dev/null", url("/outside"))
    world.do(run, "curl", "-sk", "-o", "/dev/null", url("/inside"))
    one(lambda: requests(gateway, path="/inside"))
    assert not requests(gateway, path="/outside")


def test_a_program_without_a_known_library_that_connects_to_443_is_unmeasured(
    world: World, gateway: Gateway, run: Path, tmp_path: Path
) -> None:
    source = tmp_path / "static.c"
    source.write_text(STATIC)
    program = tmp_path / "static"
    sh("gcc", "-static", "-s", "-o", str(program), str(source))
    world.do(run, str(program))
    about = one(lambda: unmeasured(gateway, "no-known-library")).attributes
    assert about["comm"] == str(program)
    assert about["count"] == 1


def test_a_program_with_a_known_library_that_connects_to_443_is_measured(
    world: World, gateway: Gateway, run: Path
) -> None:
    world.do(run, "curl", "-sk", "-o", "/dev/null", url("/https", 443))
    seen = one(lambda: requests(gateway, path="/https"))
    assert seen.attributes["peer"] == f"{SERVER4}:443"
    eventually(lambda: unmeasured(gateway, "no-known-library"), seconds=4.0)
    assert not unmeasured(gateway, "no-known-library")
    assert not unmeasured(gateway, "gone-before-look")


STATIC = """
#include <arpa/inet.h>
#include <unistd.h>
int main(void)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(443) };
	int s = socket(AF_INET, SOCK_STREAM, 0);
	inet_pton(AF_INET, "10.78.0.2", &to.sin_addr);
	if (connect(s, (void *)&to, sizeof(to)))
		return 1;
	sleep(3);
	return 0;
}
"""


def test_status_names_the_libraries_with_probes(gateway: Gateway, run: Path) -> None:
    def libraries() -> set[str]:
        return {Path(p).name for p in gateway.statuses[-1][1]["tls"]["libraries"]}

    assert eventually(lambda: {"libssl.so.3", "node"} <= libraries())
    assert any(name.startswith("libgnutls.so.30") for name in libraries())
    assert gateway.statuses[-1][1]["tls"]["problem"] == ""


SERVE_HTTP2 = """
const fs = require("fs")
const [cert, key] = process.argv.slice(1, 3).map(f => fs.readFileSync(f))
const server = require("http2").createSecureServer({cert, key})
server.on("stream", (s, h) => {
  s.on("data", () => {})
  s.on("end", () => { s.respond({":status": 200}); s.end("x".repeat(3000)) })
})
server.listen(4444, "10.78.0.2", () => console.log("serving"))
"""


def test_sees_the_requests_of_an_http2_connection(
    world: World, gateway: Gateway, run: Path, tmp_path: Path
) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(b"GET /no HTTP/1.1\r\n" * 20000)
    pem = [str(p) for p in (world.pem / "cert.pem", world.pem / "key.pem")]
    node = ("node", "-e", SERVE_HTTP2, *pem)
    with world.process(world.outside, *node):
        to = f"https://{SERVER4}:4444"
        world.do(run, "curl", "-sk", "--http2", "-o", "/dev/null", f"{to}/first?{QUERY}",
                 "--next", "-sk", "-T", str(upload), "-o", "/dev/null", f"{to}/upload",
                 "--next", "-sk", "-o", "/dev/null", f"{to}/last")  # fmt: skip
    for path in ("/first", "/upload", "/last"):
        about = one(
            lambda path=path: [
                r for r in requests(gateway, path=path) if "continued" not in r.attributes
            ]
        ).attributes
        assert (about["http"], about["host"]) == ("2", f"{SERVER4}")
    assert not requests(gateway, path="/no")
    sent = sum(r.attributes["bytes_out"] for r in requests(gateway))
    assert sent > upload.stat().st_size
    assert not [r for r in gateway.reports if r.target == "unmeasured"]


def test_a_session_from_before_the_run_is_unmeasured(
    world: World, gateway: Gateway, run: Path
) -> None:
    world.python(world.outside, f"""
        import ssl, http.client
        context = ssl._create_unverified_context()
        c = http.client.HTTPSConnection("{SERVER4}", {PORT}, context=context)
        c.request("GET", "/before")
        c.getresponse().read()
        open("{run}/cgroup.procs", "w").write(str(os.getpid()))
        c.request("GET", "/after")
        c.getresponse().read()
    """)  # fmt: skip
    assert one(lambda: unmeasured(gateway, "before-attach")).attributes["count"] == 1
    one(lambda: requests(gateway, path="/after"))
    assert not requests(gateway, path="/before")


def test_what_does_not_fit_is_counted(world: World, gateway: Gateway, run: Path) -> None:
    """Ten thousand requests at once: each is told, counted as unmeasured, or in a gap."""
    many = 10000
    world.python(run, f"""
        import ssl
        s = ssl._create_unverified_context().wrap_socket(tcp("{SERVER4}", {SINK}))
        s.settimeout(20)
        for n in range({many}):
            s.send(b"GET /flood HTTP/1.1\\r\\nHost: site.test\\r\\n\\r\\n")
    """)  # fmt: skip

    def counted() -> bool:
        told = len(
            [r for r in requests(gateway, path="/flood") if not r.attributes.get("continued")]
        )
        missed = sum(r.count for r in unmeasured(gateway, "too-many-requests"))
        missed += sum(r.count for r in unmeasured(gateway, "overload"))
        gaps = sum(r.count for r in list(gateway.reports) if "TLS events" in r.reason)
        return told > 0 and missed > 0 and told + missed + gaps >= many

    assert eventually(counted, seconds=SECONDS), gateway.statuses[-1]
    assert gateway.rung == "cgroup"


def test_the_service_gives_up_what_this_kernel_does_not_want_for_probes(
    world: World, gateway: Gateway, run: Path
) -> None:
    pids = (world.outside / "cgroup.procs").read_text().split()
    (status,) = (
        text
        for pid in pids
        if "ebpf_service.py" in Path(f"/proc/{pid}/cmdline").read_text()
        and (text := Path(f"/proc/{pid}/status").read_text())
    )
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    assert bool(effective >> capability.SYS_ADMIN & 1) is not libbpf.has_uprobe_multi()


@pytest.mark.parametrize("together", [True, False])
def test_probes_see_the_same_put_in_together_or_one_by_one(together: bool, tmp_path: Path) -> None:
    """Together is for Linux 6.6 and later; Debian 12 has the other way alone."""
    assert libbpf.has_uprobe_multi() or not together
    world = World.make("v")
    loader = world.loader()
    probes = Probes(OBJECTS, loader.shared_maps(), together=together)
    seen: list[records.Data] = []
    try:
        probes.open()
        own = own_openssl(tmp_path)
        with own.open("rb") as file:
            assert probes.attach(file.fileno(), str(own)) is not None
            again = probes.attach(file.fileno(), str(own))
            assert again is not None and again.number == 1
        ring = Ring(probes.ring_fd, lambda raw: bool(seen.append(records.decode(raw))) or True)
        run = world.run_dir(world.local)
        world.python(run, MEMORY_OPENSSL, str(own))
        assert eventually(lambda: ring.consume() and len(seen) >= 2)
        first, last = seen
        assert first.data.startswith(b"GET /memory HTTP/1.1") and first.from_start
        assert last.ended and last.offset == len(first.data)
        assert first.library == 1
        ring.close()
        probes.detach_all()
        world.python(run, MEMORY_OPENSSL, str(own))
        assert probes.counts().events == 2
    finally:
        probes.close()
        loader.close()
        world.close()


MEMORY_OPENSSL = """
import ctypes
L = ctypes.CDLL(sys.argv[1])
C = ctypes.CDLL("libcrypto.so.3", mode=ctypes.RTLD_GLOBAL)
def call(library, name, *arguments):
    function = getattr(library, name)
    function.restype = ctypes.c_void_p
    return function(*(ctypes.c_void_p(a) if isinstance(a, int) and a > 1 << 31 else a for a in arguments))
def context(method):
    c = call(L, "SSL_CTX_new", call(L, method))
    call(L, "SSL_CTX_ctrl", c, 123, 0x303, None)  # at least TLS 1.2
    call(L, "SSL_CTX_ctrl", c, 124, 0x303, None)  # and no more: it knows suites without certificates
    assert L.SSL_CTX_set_cipher_list(ctypes.c_void_p(c), b"ADH-AES256-GCM-SHA384:@SECLEVEL=0")
    if "server" in method:
        call(L, "SSL_CTX_ctrl", c, 118, 1, None)  # parameters by itself
    return c
ends = []
there, back = (call(C, "BIO_new", call(C, "BIO_s_mem")) for _ in range(2))
for method, read, write, state in (
    ("TLS_client_method", back, there, "SSL_set_connect_state"),
    ("TLS_server_method", there, back, "SSL_set_accept_state"),
):
    s = call(L, "SSL_new", context(method))
    for bio in (read, write):
        C.BIO_up_ref(ctypes.c_void_p(bio))
    call(L, "SSL_set_bio", s, read, write)
    call(L, state, s)
    ends.append(ctypes.c_void_p(s))
for _ in range(8):
    for end in ends:
        L.SSL_do_handshake(end)
head = b"GET /memory HTTP/1.1\\r\\nHost: site.test\\r\\n\\r\\n"
assert L.SSL_write(ends[0], head, len(head)) == len(head), "no handshake"
got = ctypes.create_string_buffer(100)
assert L.SSL_read(ends[1], got, 100) == len(head)
for end in ends:
    L.SSL_free(end)
"""


def test_a_fault_of_it_leaves_the_guard_and_is_told(tmp_path: Path) -> None:
    world = World.make("u")
    gateway = Gateway(tmp_path / "enforce")
    gateway.open()
    objects = tmp_path / "objects"
    objects.mkdir()
    for name in ("observe.bpf.o", "guard_cgroup.bpf.o"):
        shutil.copy(OBJECTS / name, objects / name)
    (objects / "tls.bpf.o").write_bytes(b"no object")
    running = Running(world, gateway, objects=objects)
    try:
        assert eventually(lambda: gateway.rung == "cgroup", seconds=READY_SECONDS)
        cgroup = world.run_dir(world.proxied)
        gateway.starting("r", str(cgroup.relative_to(world.root)), ids(cgroup))
        assert eventually(lambda: gateway.confirmed.get("r") == (True, ""), seconds=READY_SECONDS)

        def told() -> bool:
            problems = gateway.statuses[-1][1]["problems"]
            return any("TLS plaintext is not seen" in p for p in problems) and any(
                r.type is RecordType.ALERT and "TLS plaintext" in r.reason
                for r in list(gateway.reports)
            )

        assert eventually(told, seconds=SECONDS)
    finally:
        log = running.stop()
        gateway.close()
        world.close()
    assert "Traceback" not in log, log
