"""Leaves from the proxy's side: kept, renewed, and following the intermediate without a break."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from aa.ca import leaf as leaf_module
from aa.ca.certificate import belongs, fingerprint, parse_certificate, validity
from aa.ca.errors import CannotIssue, CertificateAuthorityError
from aa.ca.inspected import parse
from tests.unit.ca_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_same_leaf_is_given_again_until_half_of_its_life_is_over(world: World) -> None:
    issuer = world.issuer()
    first = issuer.issue("a.example")
    world.pass_time(hours=23)
    assert issuer.issue("a.example") is first
    world.pass_time(hours=2)
    second = issuer.issue("a.example")
    assert second is not first
    begins, ends = validity(second.certificate)
    assert begins <= world.now < ends


def test_a_clock_that_goes_back_gets_another_leaf(world: World) -> None:
    issuer = world.issuer()
    world.pass_time(days=1)
    first = issuer.issue("a.example")
    world.pass_time(hours=-2)
    second = issuer.issue("a.example")
    assert second is not first
    assert validity(second.certificate)[0] <= world.now


def test_leaves_are_bounded_and_the_unused_go_first(world: World) -> None:
    issuer = world.issuer(limit=3)
    kept = issuer.issue("kept.example")
    for n in range(10):
        issuer.issue(f"h{n}.example")
        assert issuer.issue("kept.example") is kept
        assert len(issuer) <= 3


def test_refused_hosts_are_not_kept(world: World) -> None:
    issuer = world.issuer()
    for n in range(50):
        with pytest.raises(CannotIssue):
            issuer.issue(f"not a host {n}")
    assert len(issuer) == 0


def test_one_key_for_all_hosts_of_an_intermediate_and_another_for_the_next(world: World) -> None:
    issuer = world.issuer()
    a, b = issuer.issue("a.example"), issuer.issue("b.example")
    assert a.key is b.key and belongs(a.key, a.certificate) and belongs(b.key, b.certificate)
    world.pass_time(days=5)
    world.renew()
    assert issuer.issue("a.example").key is not a.key


def test_another_intermediate_is_used_from_the_next_leaf_on(world: World) -> None:
    issuer = world.issuer()
    before = issuer.issue("a.example")
    world.pass_time(days=5)
    world.renew()
    after = issuer.issue("a.example")
    assert fingerprint(after.chain[0]) != fingerprint(before.chain[0])
    for leaf in (before, after):
        assert world.openssl(leaf, "-no_check_time").returncode == 0
    assert issuer.intermediate is after.chain[0]


def test_a_handed_out_leaf_serves_on_after_a_renewal(world: World) -> None:
    issuer = world.issuer()
    before = issuer.issue("a.example")
    assert world.renew(parse("a.example\n")).why
    world.handshake(before, "a.example")


def test_reread_says_whether_there_was_something_new(world: World) -> None:
    issuer = world.issuer()
    assert issuer.reread() is True
    assert issuer.reread() is False
    world.pass_time(days=5)
    world.renew()
    assert issuer.reread() is True


@pytest.mark.parametrize("harm", ["gone", "junk", "open", "directory"])
def test_a_broken_new_intermediate_changes_nothing(
    world: World, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = world.issuer()
    before = issuer.issue("a.example")
    damage(world, harm)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert issuer.issue("a.example") is before
            issuer.issue("b.example")
    if harm != "directory":
        assert caplog.text.count("stays") == 1, "told once"
        with pytest.raises(CertificateAuthorityError):
            issuer.reread()


@pytest.mark.parametrize("harm", ["gone", "junk", "open", "directory"])
def test_a_broken_first_intermediate_is_an_error_with_what_to_do(world: World, harm: str) -> None:
    damage(world, harm)
    issuer = world.issuer()
    with pytest.raises(CannotIssue) as caught:
        issuer.issue("a.example")
    assert str(world.places.proxy) in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


def damage(world: World, how: str) -> None:
    path = world.places.intermediate
    if how == "gone":
        path.unlink()
    elif how == "directory":
        world.places.proxy.chmod(0o777)
    else:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(b"junk" if how == "junk" else content)
        path.chmod(0o440 if how == "junk" else 0o644)


def test_what_was_broken_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = world.issuer()
    before = issuer.issue("a.example")
    damage(world, "junk")
    assert issuer.issue("a.example") is before
    world.renew()
    monkeypatch.setattr(leaf_module, "RETRY_SECONDS", 0.0)
    issuer._retry_at = 0.0
    assert fingerprint(issuer.issue("a.example").chain[0]) != fingerprint(before.chain[0])


def test_an_issuer_made_before_the_first_intermediate_works_once_there_is_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "early").mkdir()
    world = World(tmp_path / "early")
    kept = world.places.intermediate.read_bytes()
    damage(world, "gone")
    issuer = world.issuer()
    with pytest.raises(CannotIssue):
        issuer.issue("a.example")
    world.places.intermediate.write_bytes(kept)
    world.places.intermediate.chmod(0o440)
    issuer.issue("a.example")


def test_chain_is_leaf_then_intermediate_and_never_the_root(world: World) -> None:
    leaf = world.issuer().issue("a.example")
    blocks = leaf.chain_pem.split(b"-----END CERTIFICATE-----\n")[:-1]
    assert len(blocks) == 2
    first = parse_certificate(leaf.chain_pem, "chain")
    assert fingerprint(first) == fingerprint(leaf.certificate)
    assert b"PRIVATE" not in leaf.chain_pem


def test_no_secret_in_what_a_leaf_prints_of_itself(world: World) -> None:
    leaf = world.issuer().issue("a.example")
    body = leaf.key_pem.splitlines()[1].decode()
    assert body not in repr(leaf) and "PRIVATE" not in repr(leaf)
