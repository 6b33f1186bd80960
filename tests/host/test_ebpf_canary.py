"""The canary comes back with proof only when the guard guards and the events are seen."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aa.ebpf import canary, libbpf
from aa.ebpf.canary import CGROUP_NAME, CLOSED_PORT, Canary, Proof
from aa.ebpf.events import decode
from aa.ebpf.loader import Loader
from aa.ebpf.reader import RingReader
from aa.ebpf.tables import End
from tests.host.ebpf_world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.make("y")
    yield world
    world.close()


@pytest.fixture
def loader(world: World) -> Iterator[Loader]:
    loader = world.loader()
    yield loader
    loader.close()


def canaries(world: World) -> list[Path]:
    return list(world.proxied.glob(f"{CGROUP_NAME}*"))


def fly(loader: Loader, *, listen: bool = True) -> Proof:
    async def go() -> Proof:
        canary = Canary(loader)

        def take(batch: list[bytes]) -> None:
            for record in batch:
                event = decode(record)
                if listen:
                    canary.saw(event.head.cgroup, event)

        reader = RingReader(loader.ring_fd, take)
        reader.start()
        try:
            return await canary.fly()
        finally:
            await reader.stop()

    return asyncio.run(go())


def test_proves_guard_and_sight(world: World, loader: Loader) -> None:
    assert fly(loader) == Proof((), ())
    assert not canaries(world)
    assert fly(loader) == Proof((), ()), "a second flight proves as much"


FLOOD = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    for n in range(20_000):
        s.connect(("127.0.0.1", 1024 + n % 60_000))
"""


def test_a_flood_that_fills_the_ring_does_not_hide_the_canary(
    world: World, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one run could keep all others from being started."""

    async def go() -> Proof:
        flown = Canary(loader)

        def take(batch: list[bytes]) -> None:
            for event in map(decode, batch):
                flown.saw(event.head.cgroup, event)

        reader = RingReader(loader.ring_fd, take)
        send = canary._send_child

        async def send_and_only_then_read(*arguments: Any) -> Any:
            tried = await send(*arguments)
            reader.start()
            return tried

        monkeypatch.setattr(canary, "_send_child", send_and_only_then_read)
        try:
            return await flown.fly()
        finally:
            await reader.stop()

    loader.watch_files(True)
    try:
        before = lost(loader)
        world.python(world.run_dir(world.proxied), FLOOD)
        assert lost(loader) > before, "the flood did not fill the ring"
        assert asyncio.run(go()) == Proof((), ())
    finally:
        loader.watch_files(False)


def lost(loader: Loader) -> int:
    return sum(count.lost for count in loader.counts().values())


def test_what_a_killed_flight_left_behind_is_no_obstacle(world: World, loader: Loader) -> None:
    """Nor is it taken over: within a second the kernel does not tell again what it told of it."""
    left, held = (world.proxied / f"{CGROUP_NAME}-{n}" for n in (1, 2))
    left.mkdir()
    held.mkdir()
    with subprocess.Popen(["sleep", "60"]) as child:
        (held / "cgroup.procs").write_text(str(child.pid))
        assert fly(loader) == Proof((), ())
        assert canaries(world) == [held]
        child.kill()
    assert fly(loader) == Proof((), ())
    assert not canaries(world)


def test_a_hole_in_the_table_is_no_proof(loader: Loader) -> None:
    hole = End(ipaddress.IPv4Address("127.0.0.1"), CLOSED_PORT, socket.IPPROTO_UDP)
    libbpf.map_update(loader.map_fd("aa_ends"), hole.pack(), b"\1")
    try:
        # The loader sees the table itself; here only the canary's own words count.
        proof = asyncio.run(_child_only(loader))
        assert "a packet to a closed port was let through" in proof
    finally:
        libbpf.map_delete(loader.map_fd("aa_ends"), hole.pack())


async def _child_only(loader: Loader) -> tuple[str, ...]:
    canary = Canary(loader)
    loader._ends |= loader.ends  # as if the hole were meant
    return (await canary.fly()).guard


def test_an_empty_table_refuses_the_twin_and_is_no_proof(loader: Loader) -> None:
    for key in loader.ends:
        libbpf.map_delete(loader.map_fd("aa_ends"), key)
    loader._ends = frozenset()
    proof = fly(loader)
    assert any("the proxy's own end was refused" in why for why in proof.guard)


def test_unseen_events_are_no_proof(loader: Loader) -> None:
    proof = fly(loader, listen=False)
    assert proof.guard == ()
    assert len(proof.observe) == 4


def test_a_refusal_by_something_else_is_no_proof(world: World, loader: Loader) -> None:
    """Without our guard a firewall may refuse as well: then nothing of ours was proved."""
    links = [world.pins / "links" / name for name in ("aa_egress", "aa_sock_create")]
    for link in links:
        link.unlink()
    for name in ("aa_egress", "aa_sock_create"):
        program = loader._programs[name]
        assert program.link is not None
        os.close(program.link)
        program.link = None
    proof = fly(loader)
    assert proof.guard


def test_without_its_slice_it_cannot_fly_and_says_so(world: World, loader: Loader) -> None:
    world.remove_slices()
    try:
        proof = fly(loader)
        assert "could not fly" in proof.guard[0] and "could not fly" in proof.observe[0]
    finally:
        world.make_slices()
