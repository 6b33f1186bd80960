"""What comes back from a guest, and the page that is made of it."""

from __future__ import annotations

import datetime
import io
import tarfile
from pathlib import Path

from tests.lab.qemu import guest, results
from tests.lab.qemu.cases import Case, Outcome
from tests.lab.qemu.guest import Report

DAY = datetime.date(2026, 1, 2)


def outcome(*cases: Case) -> Outcome:
    report = Report(0, Path("/nowhere"), "", 60.0)
    return Outcome("bookworm", "6.1.0-1-amd64", "252.1", "3.11.2", cases, report)


def case(name: str, result: str = "passed") -> Case:
    return Case("case_chain", name, result, 1.6, "")


def test_the_page_has_a_row_for_each_case_and_counts_those_that_passed() -> None:
    page = results.table([outcome(case("it works"), case("it fails", "failed"))], day=DAY)
    assert "| bookworm | 6.1.0-1-amd64 | 252.1 | 3.11.2 | 1 | 2 |" in page
    assert "| bookworm | 6.1.0-1-amd64 | 252.1 | chain: it works | passed | 2 |" in page
    assert "| bookworm | 6.1.0-1-amd64 | 252.1 | chain: it fails | failed | 2 |" in page


def test_the_page_says_which_command_made_it_and_when() -> None:
    page = results.table([outcome(case("it works"))], day=DAY)
    assert "`make lab-full` on 2026-01-02" in page


def test_a_bar_in_a_case_does_not_break_its_row() -> None:
    page = results.table([outcome(case("a (x|y)"))], day=DAY)
    assert "a (x&#124;y)" in page


def test_what_a_guest_leaves_cannot_be_written_outside_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "output.tar"
    with tarfile.open(archive, "w") as packed:
        for name in ("kept/here", "../above", str(tmp_path / "absolute")):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            packed.addfile(entry, io.BytesIO(b"x\n"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        packed.addfile(link)
    out = tmp_path / "out"
    guest._unpack(archive, out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["kept", "kept/here"]
    assert not (tmp_path / "above").exists() and not (tmp_path / "absolute").exists()
