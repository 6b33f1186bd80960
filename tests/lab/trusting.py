"""A container whose runs talk to a host in the name of this host's own authority.

The part of the inspection worker is played by a relay: it presents the worker's certificate, made
by the worker's code as the worker's user, and passes on what comes.
"""

from __future__ import annotations

from tests.lab.clients import FOLDER, JAVA, Client
from tests.lab.guarded import POLICY_FILE, governed, guard
from tests.lab.harness import Container, Result, eventually
from tests.lab.harness.__main__ import HERE, newest_debs
from tests.lab.harness.names import API

POLICY = f"""
[policy]
id      = "lab"
default = {{ network = "deny", dns = "deny" }}

[[rule]]
id      = "relay"
effect  = "allow"
network = {{ hosts = ["{API}"], cidrs = ["127.0.0.0/8"] }}
"""

RELAY = """
import asyncio, ssl, sys, tempfile
from aa.ca.leaf import LeafIssuer

host, origin = sys.argv[1:]
leaf = LeafIssuer().issue(host)
inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
with tempfile.NamedTemporaryFile() as file:
    file.write(leaf.key_pem + leaf.chain_pem)
    file.flush()
    inward.load_cert_chain(file.name)
outward = ssl.create_default_context()

async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (OSError, ssl.SSLError):
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    up, down = await asyncio.open_connection(origin, 443, ssl=outward, server_hostname=host)
    await asyncio.gather(pump(reader, down), pump(up, writer))

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 443, ssl=inward)
    await server.serve_forever()

asyncio.run(main())
"""


def prepare(box: Container) -> None:
    """Installs both packages, as a person would, and puts the relay between runs and the origin."""
    box.install_deb(*newest_debs(engine=HERE))
    guard(box)
    box.push(POLICY_FILE, POLICY)
    box.run(["aasm", "policy", "reload"]).check()
    box.push(f"{FOLDER}/Fetch.java", JAVA)
    box.raw(["sh", "-c", f"echo 127.0.0.1 {API} >>/etc/hosts"]).check()
    hosts = "/run/agent-assembly/inspected/hosts"
    box.raw(["sh", "-c", f"echo {API} >{hosts} && chown aa-gateway {hosts}"]).check()
    box.systemctl("start", "aa-ca").check()
    box.push("/usr/local/lib/lab/relay.py", RELAY)
    box.raw(
        ["systemd-run", "--quiet", "--unit=lab-relay", "--uid=aa-proxy",
         "--property=AmbientCapabilities=CAP_NET_BIND_SERVICE",
         "/usr/bin/python3", "-I", "/usr/local/lib/lab/relay.py", API, "10.77.0.10"]
    ).check()  # fmt: skip
    eventually(lambda: "127.0.0.1:443" in box.raw(["ss", "-Hltn"]).out, what="the relay listens")


def ask(box: Container, client: Client) -> tuple[Result, bool]:
    """What the client did in a run, and whether the origin was asked by it."""
    mark = box.origins.mark()
    done = governed(box, client.argv, timeout=60)
    return done, bool(box.origins.since(mark, kind="request", path=client.path))
