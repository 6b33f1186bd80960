"""For every test: one that is skipped, or expected to fail, counts as failed."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

SKIPPED = "a skipped test proves nothing: install what it needs, or delete it"


def _fail_if_skipped(report: Any) -> None:
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"{SKIPPED}\n{report.longrepr}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    _fail_if_skipped(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    outcome = yield
    _fail_if_skipped(outcome.get_result())
