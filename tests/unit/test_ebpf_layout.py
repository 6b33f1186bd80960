"""The two sides of probes/events.h agree: a C compiler's sizes and offsets against the decoder's."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from aa.ebpf import canary, events, loader, tables
from aa.ebpf.tls import probes, records

PROBES = Path(__file__).parents[2] / "probes"

PROGRAM = r"""
#include <stdio.h>
#include <stddef.h>
#include <linux/types.h>
#include "tls_events.h"
#define SIZE(t) printf("sizeof " #t " %zu\n", sizeof(struct t))
#define AT(t, f) printf(#t "." #f " %zu\n", offsetof(struct t, f))
int main(void)
{
	SIZE(aa_head); SIZE(aa_exit); SIZE(aa_tally_key); SIZE(aa_tally); SIZE(aa_net);
	SIZE(aa_end); SIZE(aa_config); SIZE(aa_count);
	SIZE(aa_mapped); AT(aa_file, data); AT(aa_file, result); AT(aa_file, text_len); AT(aa_file, call);
	AT(aa_exec, data); AT(aa_exec, filename_len); AT(aa_head, comm); AT(aa_net, key);
	SIZE(aa_tls_key); SIZE(aa_tls_session); SIZE(aa_tls_data); SIZE(aa_tls_count);
	AT(aa_tls_data, born); AT(aa_tls_data, captured); AT(aa_tls_data, peer_addr);
	AT(aa_tls_session, in);
	AT(aa_net, total); AT(aa_tally_key, port); AT(aa_tally_key, reason); AT(aa_exit, status);
	return 0;
}
"""


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    directory = tmp_path_factory.mktemp("layout")
    (directory / "m.c").write_text(PROGRAM)
    subprocess.run(
        ["gcc", f"-I{PROBES}", "-o", directory / "m", directory / "m.c"], check=True, timeout=60
    )
    text = subprocess.run([directory / "m"], check=True, capture_output=True, text=True, timeout=10)
    return {k: int(v) for k, v in (line.rsplit(" ", 1) for line in text.stdout.splitlines())}


def test_sizes_and_offsets(c: dict[str, int]) -> None:
    assert c == {
        "sizeof aa_head": events.HEAD.size,
        "sizeof aa_exit": events.EXIT_SIZE,
        "sizeof aa_tally_key": events.KEY.size,
        "sizeof aa_tally": tables.TALLY.size,
        "sizeof aa_net": events.NET_SIZE,
        "sizeof aa_end": tables.END_SIZE,
        "sizeof aa_config": tables.CONFIG_SIZE,
        "sizeof aa_count": tables.COUNT_SIZE,
        "sizeof aa_tls_key": records.KEY.size,
        "sizeof aa_tls_session": records.SESSION.size,
        "sizeof aa_tls_data": records.FIXED_SIZE,
        "sizeof aa_tls_count": records.COUNT.size,
        "aa_tls_data.born": events.HEAD.size + records.KEY.size,
        "aa_tls_data.captured": events.HEAD.size + records.KEY.size + struct.calcsize("=QQQI"),
        "aa_tls_data.peer_addr": records.FIXED_SIZE - 16,
        "aa_tls_session.in": struct.calcsize("=QQ"),
        "sizeof aa_mapped": events.MAPPED_SIZE,
        "aa_file.data": events.FILE_SIZE,
        "aa_file.result": events.HEAD.size + struct.calcsize("=QII"),
        "aa_file.text_len": events.HEAD.size + struct.calcsize("=QIIi"),
        "aa_file.call": events.HEAD.size + struct.calcsize("=QIIiHHHH"),
        "aa_exec.data": events.EXEC_SIZE,
        "aa_exec.filename_len": events.HEAD.size + struct.calcsize("=QII"),
        "aa_head.comm": events.HEAD.size - events.COMM_MAX,
        "aa_net.key": events.HEAD.size,
        "aa_net.total": events.HEAD.size + events.KEY.size,
        "aa_tally_key.port": struct.calcsize("=Q16s"),
        "aa_tally_key.reason": struct.calcsize("=Q16sHHBB"),
        "aa_exit.status": events.HEAD.size + 8,
    }
    assert loader.TALLY_KEY_SIZE == events.KEY.size


def test_constants() -> None:
    text = (PROBES / "events.h").read_text() + (PROBES / "tls_events.h").read_text()

    def number(name: str) -> int:
        found = re.search(rf"\b{name}\s*=?\s*\(?(\d+)(?: << (\d+))?", text)
        assert found, name
        return int(found[1]) << int(found[2] or 0)

    assert number("AA_LAYOUT") == events.LAYOUT
    for name in ("COMM_MAX", "ARGV_MAX", "FILENAME_MAX", "PATH_MAX", "FILE_RATE"):
        assert number(f"AA_{name}") == getattr(events, name)
    for name in (
        "EXEC",
        "EXIT",
        "CONNECT",
        "REFUSED",
        "FILE",
        "MAPPED",
        "VIA_CONNECT",
        "VIA_DATAGRAM",
        "VIA_FOREIGN",
        "VIA_FILES",
        "REFUSED_END",
        "REFUSED_FRAGMENT",
        "REFUSED_HEADER",
        "REFUSED_INTERFACE",
        "REFUSED_SOCKET",
        "REFUSED_JOIN",
        "ARGV_CUT",
        "ARGV_UNREAD",
        "FILENAME_CUT",
        "EXE_CUT",
        "CWD_CUT",
        "OUTSIDE",
        "OPENED",
        "CREATED",
        "TEXT_CUT",
        "DIR_CUT",
        "TO_CUT",
        "TO_DIR_CUT",
    ):
        assert number(f"AA_{name}") == getattr(events, name), name
    for call, name in enumerate(events.CALLS[1:], start=1):
        assert number(f"AA_CALL_{name.upper()}") == call
    for name in ("DATA", "END", "FROM_START", "HTTP2", "ENDED", "UNREAD", "DATA_MAX", "HEAD_MAX"):
        assert number(f"AA_TLS_{name}") == getattr(records, name), name
    assert number("AA_TLS_RATE") == records.RATE
    assert number("AA_KINDS") == tables.KINDS
    assert number("AA_MAX_ENDS") == tables.MAX_ENDS
    assert number("AA_MAX_TALLIES") == tables.MAX_TALLIES


def test_every_program_of_the_sources_is_known_to_the_loader() -> None:
    sources = {p.stem.removesuffix(".bpf") + ".bpf.o": p for p in PROBES.glob("*.bpf.c")}
    found = {
        (name, program)
        for name, source in sources.items()
        for program in re.findall(
            r'SEC\("(?!license|\.maps)[^"]+"\)\s*\nint (?:BPF_PROG\()?(\w+)', source.read_text()
        )
    }
    known = {(p.object, p.name) for p in loader.PROGRAMS}
    assert found == known | {(probes.OBJECT, name) for name in probes.PROGRAMS}


def test_the_canarys_closed_port_is_no_end_of_the_proxy() -> None:
    assert canary.CLOSED_PORT not in {end.port for end in tables.proxy_ends()}
