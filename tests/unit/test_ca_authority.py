"""Making, renewing and rotating on disk, with the power cut at every step."""

from __future__ import annotations

import datetime
import os
import stat
from pathlib import Path

import pytest

from aa.ca import authority, files
from aa.ca.certificate import (
    belongs,
    fingerprint,
    host_name,
    issued,
    name_constraints,
    parse_certificate,
    parse_key,
    permits,
)
from aa.ca.errors import CertificateAuthorityError, UnsafeFile
from aa.ca.inspected import NOTHING, parse
from tests.unit.ca_world import EVERYTHING, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def root_of(world: World) -> bytes:
    return world.places.root_certificate.read_bytes()


def test_first_start_makes_root_and_intermediate_with_their_modes(world: World) -> None:
    modes = {
        str(p.relative_to(world.directory)): oct(stat.S_IMODE(p.stat().st_mode))
        for p in world.directory.rglob("*")
    }
    assert modes == {
        "ca": "0o755",
        "ca/root.key": "0o400",
        "ca/root.pem": "0o444",
        "ca/intermediate.pem": "0o444",
        "proxy-ca": "0o750",
        "proxy-ca/intermediate.pem": "0o440",
    }
    assert b"PRIVATE" not in world.places.published.read_bytes()


def test_a_second_start_changes_nothing(world: World) -> None:
    before = {p: p.read_bytes() for p in world.directory.rglob("*.*")}
    renewal = world.renew(EVERYTHING)
    assert renewal.why == ""
    assert {p: p.read_bytes() for p in world.directory.rglob("*.*")} == before


def test_renews_below_half_of_its_life_and_not_above(world: World) -> None:
    first = fingerprint(world.renew().intermediate)
    world.pass_time(days=3, hours=11)
    assert fingerprint(world.renew().intermediate) == first
    world.pass_time(hours=2)
    renewal = world.renew()
    assert fingerprint(renewal.intermediate) != first
    assert "ends on" in renewal.why


def test_renews_when_the_clock_was_set_back(world: World) -> None:
    world.pass_time(hours=-1.5)
    # the root begins in the future as well: that is for a person
    with pytest.raises(CertificateAuthorityError, match="clock"):
        world.renew()
    world.pass_time(hours=1.5, days=3)
    late = world.renew()
    assert late.why == ""


def test_renews_when_other_hosts_are_inspected(tmp_path: Path) -> None:
    world = World(tmp_path, parse("a.example\n"))
    assert world.renew(parse("a.example\n")).why == ""
    renewal = world.renew(parse("a.example\nb.example\n"))
    assert renewal.why == "other hosts are inspected"
    limits = name_constraints(renewal.intermediate)
    assert permits(limits, host_name("b.example")) and not permits(limits, host_name("c.example"))


def test_without_news_the_limits_stay(tmp_path: Path) -> None:
    world = World(tmp_path, parse("a.example\n"))
    assert world.renew(None).why == ""
    world.pass_time(days=5)
    limits = name_constraints(world.renew(None).intermediate)
    assert permits(limits, host_name("a.example")) and not permits(limits, host_name("b.example"))


def test_the_limits_survive_an_intermediate_that_cannot_be_read(tmp_path: Path) -> None:
    world = World(tmp_path, parse("a.example\n"))
    world.places.intermediate.unlink()
    limits = name_constraints(world.renew(None).intermediate)
    assert permits(limits, host_name("a.example")) and not permits(limits, host_name("b.example"))
    world.places.intermediate.unlink()
    world.places.published.unlink()
    limits = name_constraints(world.renew(None).intermediate)
    assert not permits(limits, host_name("a.example"))


def test_before_anybody_said_what_is_inspected_nothing_can_be_signed(tmp_path: Path) -> None:
    world = World(tmp_path, None)
    limits = name_constraints(world.renew(None).intermediate)
    assert limits == authority.constraints_for(NOTHING)
    assert not permits(limits, host_name("a.example")) and not permits(
        limits, host_name("10.0.0.1")
    )


def test_reader_never_sees_a_key_of_another_certificate(world: World) -> None:
    """The file changes in one rename, so a reader that has it open reads the old pair to its end."""
    with world.places.intermediate.open("rb") as reader:
        begin = reader.read(100)
        world.pass_time(days=5)
        assert world.renew().why
        old = begin + reader.read()
    assert belongs(parse_key(old, "old"), parse_certificate(old, "old"))
    new = world.places.intermediate.read_bytes()
    assert new != old and belongs(parse_key(new, "new"), parse_certificate(new, "new"))


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\n"])
def test_an_intermediate_that_cannot_be_read_is_replaced(world: World, content: bytes) -> None:
    world.places.intermediate.chmod(0o600)
    world.places.intermediate.write_bytes(content)
    world.places.intermediate.chmod(0o440)
    assert world.renew().why == "there was none"
    authority.read_intermediate(world.places.intermediate)


def test_an_intermediate_that_others_could_read_is_replaced(world: World) -> None:
    before = world.places.published.read_bytes()
    world.places.intermediate.chmod(0o444)
    with pytest.raises(UnsafeFile):
        authority.read_intermediate(world.places.intermediate)
    assert world.renew().why == "there was none"
    assert stat.S_IMODE(world.places.intermediate.stat().st_mode) == 0o440
    assert world.places.published.read_bytes() != before


def test_a_root_key_that_others_could_read_is_refused_and_not_mended(world: World) -> None:
    world.places.root_key.chmod(0o440)
    with pytest.raises(UnsafeFile, match="aasm ca rotate"):
        world.renew()
    assert stat.S_IMODE(world.places.root_key.stat().st_mode) == 0o440
    world.places.root_key.chmod(0o400)
    assert world.renew().why == ""


@pytest.mark.parametrize("missing", ["root_key", "root_certificate"])
def test_half_a_root_is_refused_with_what_to_do(world: World, missing: str) -> None:
    path: Path = getattr(world.places, missing)
    path.unlink()
    with pytest.raises(CertificateAuthorityError, match="aasm ca rotate") as caught:
        world.renew()
    assert str(path) in str(caught.value)
    world.rotate()
    assert world.renew(EVERYTHING).why == "the root is a new one"


def test_a_root_with_another_roots_key_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    world.places.root_key.unlink()
    os.rename(other.places.root_key, world.places.root_key)
    with pytest.raises(CertificateAuthorityError, match="not the key of"):
        world.renew()


def test_rotation_replaces_everything_and_the_intermediate_follows(world: World) -> None:
    before, leaf = root_of(world), world.issuer().issue("a.example")
    authority.stage(world.places, host="box", now=world.now)
    assert root_of(world) == before, "a staged root is not used"
    assert world.renew().why == "", "a staged root changes nothing"
    authority.commit(world.places)
    assert root_of(world) != before
    assert world.renew().why == "the root is a new one"
    assert world.openssl(leaf).returncode != 0
    assert world.openssl(world.issuer().issue("a.example")).returncode == 0
    assert sorted(p.name for p in world.places.root.iterdir()) == [
        "intermediate.pem", "root.key", "root.pem",
    ]  # fmt: skip


def test_staging_again_replaces_what_was_staged(world: World) -> None:
    first = authority.stage(world.places, host="box", now=world.now)
    second = authority.stage(world.places, host="box", now=world.now)
    assert fingerprint(authority.commit(world.places)) == fingerprint(second) != fingerprint(first)


class PowerCut(BaseException):
    """Nothing after it happens."""


@pytest.mark.parametrize("steps", range(12))
def test_a_power_cut_at_any_step_of_a_rotation_leaves_an_authority_that_works(
    world: World, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    before = root_of(world)
    left = steps

    def until_cut(real):  # type: ignore[no-untyped-def]
        def call(*a, **k):  # type: ignore[no-untyped-def]
            nonlocal left
            if left == 0:
                raise PowerCut
            left -= 1
            return real(*a, **k)

        return call

    for module, name in ((os, "rename"), (os, "open"), (os, "fsync")):
        monkeypatch.setattr(module, name, until_cut(getattr(module, name)))
    cut = False
    try:
        world.rotate()
    except PowerCut:
        cut = True
    monkeypatch.undo()
    assert cut, "the rotation has more steps than this test cuts"
    renewal = world.renew()
    root = parse_certificate(root_of(world), "root")
    assert issued(root, renewal.intermediate)
    key, _ = authority.read_root(world.places)
    assert belongs(key, root)
    assert world.openssl(world.issuer().issue("a.example")).returncode == 0
    world.rotate()
    assert root_of(world) != before
    assert world.renew().why == "the root is a new one"


def test_a_power_cut_between_the_two_renames_is_finished_by_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = authority.stage(world.places, host="box", now=world.now)
    real = files.rename

    def first_only(source: Path, target: Path) -> None:
        real(source, target)
        raise PowerCut

    monkeypatch.setattr(files, "rename", first_only)
    with pytest.raises(PowerCut):
        authority.commit(world.places)
    monkeypatch.undo()
    assert world.renew().why == "the root is a new one"
    assert fingerprint(parse_certificate(root_of(world), "root")) == fingerprint(staged)


def test_everybody_may_know_root_and_intermediate_and_nothing_else(world: World) -> None:
    known = authority.published(world.places)
    assert known is not None and known.intermediate is not None and not known.rotating
    assert issued(known.root, known.intermediate)
    authority.stage(world.places, host="box", now=world.now)
    known = authority.published(world.places)
    assert known is not None and known.rotating


def test_there_is_nothing_to_know_before_the_first_start(tmp_path: Path) -> None:
    assert authority.published(authority.Places(tmp_path / "ca", tmp_path / "proxy-ca")) is None


def test_warns_of_a_root_that_ends_soon(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.renew()
    assert "aasm ca rotate" not in caplog.text
    world.now += datetime.timedelta(days=3650 - 89)
    world.renew()
    assert "aasm ca rotate" in caplog.text
