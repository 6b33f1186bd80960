"""The package on Debian 12's and Debian 13's own kernel and systemd, each in a guest of its own.

One guest of a suite runs every case of `inside/`; docs/lab-results.md is written when all suites have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.lab.qemu import results
from tests.lab.qemu.cases import FILES, Outcome, inside, run_cases
from tests.lab.qemu.guest import GUEST_TIMEOUT
from tests.lab.qemu.image import BUILD_TIMEOUT, SUITES

WAIT_FOR_OTHERS = (
    2 * GUEST_TIMEOUT
)  # seconds that other guests of this machine may take before ours

pytestmark = pytest.mark.timeout(BUILD_TIMEOUT + GUEST_TIMEOUT + WAIT_FOR_OTHERS)


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Callable[[str], Outcome]]:
    """The outcome of a suite's guest, which boots when it is first asked for; its console is shown."""
    known: dict[str, Outcome] = {}
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def of(suite: str) -> Outcome:
        if suite not in known:
            out = tmp_path_factory.mktemp(suite)
            files = [inside(file) for file in FILES]
            with capture.global_and_fixture_disabled():
                known[suite] = run_cases(suite, files, out, follow=True)
        return known[suite]

    yield of
    if set(known) == set(SUITES):
        results.write([known[suite] for suite in SUITES])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("suite", SUITES)
def test_every_case_passes(outcomes: Callable[[str], Outcome], suite: str, file: str) -> None:
    outcome = outcomes(suite)
    cases = outcome.of(file)
    wrong = [case for case in cases if case.outcome != "passed"]
    said = "\n\n".join(f"{case.name}: {case.outcome}\n{case.said}" for case in wrong)
    assert cases, f"no case of {file} ran:\n{outcome.report.tail()}"
    assert not wrong, (
        f"{suite}, {outcome.kernel}:\n{said}\nwhat the guest left: {outcome.report.out}"
    )


@pytest.mark.parametrize("suite", SUITES)
def test_the_guest_ran_every_case_to_the_end(
    outcomes: Callable[[str], Outcome], suite: str
) -> None:
    """Also when it ran out of time, or fell over after the last result that it wrote."""
    report = outcomes(suite).report
    assert report.code == 0, report.tail()
