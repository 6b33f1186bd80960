"""What a guest's disk is made of: read from our package and from the kernel's own tables."""

from __future__ import annotations

import pytest

from tests.lab.harness import LabError
from tests.lab.qemu import image

CONTROL = """\
Source: agent-assembly
Build-Depends:
 clang,
 debhelper-compat (= 13),

Package: agent-assembly
Depends:
 iptables,
 python3 (>= 3.11),
 python3-click | python3-typer,
 ${misc:Depends},
Description: text, with a comma
 Depends: not a field

Package: agent-assembly-inspect
Depends: agent-assembly (= ${binary:Version}), openssl:any
"""

TABLE = {
    "kernel/fs/ext4/ext4.ko.xz": ["kernel/fs/jbd2/jbd2.ko.xz", "kernel/lib/crc16.ko.xz"],
    "kernel/fs/jbd2/jbd2.ko.xz": [],
    "kernel/lib/crc16.ko.xz": [],
    "kernel/drivers/block/virtio-blk.ko": [],
}


def test_dependencies_are_those_of_the_binary_packages_without_versions_alternatives_and_ourselves() -> (
    None
):
    assert image.dependencies(CONTROL) == ["iptables", "python3", "python3-click", "openssl"]


def test_every_dependency_of_our_package_is_installed_in_a_guest() -> None:
    wanted = image.dependencies(image.CONTROL.read_text())
    assert "iptables" in wanted and set(wanted) <= set(image.packages())


def test_a_module_is_loaded_after_what_it_needs() -> None:
    order = image.load_order(TABLE, ["ext4", "virtio_blk"])
    assert order.index("kernel/fs/jbd2/jbd2.ko.xz") < order.index("kernel/fs/ext4/ext4.ko.xz")
    assert order[-1] == "kernel/drivers/block/virtio-blk.ko"


def test_a_module_that_is_built_in_is_left_out() -> None:
    assert image.load_order(TABLE, ["virtio_pci"]) == []


def test_an_unknown_suite_is_refused_before_anything_is_made() -> None:
    with pytest.raises(LabError, match="no such suite: warty"):
        image.image("warty")
