"""Logging to stderr in the form that journald reads from a stream, for every process of ours."""

from __future__ import annotations

import logging
import os
import sys

JOURNAL_STREAM_FORMAT = "%(message)s"
LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class _JournalFormatter(logging.Formatter):
    """Puts the priority that journald reads from a stream (sd-daemon(3)) before each line."""

    def format(self, record: logging.LogRecord) -> str:
        priority = LEVELS.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def log_to_journal(level: int = logging.INFO) -> None:
    """Logs to stderr, which systemd connects to the journal."""
    stream = logging.StreamHandler(sys.stderr)
    formatter = _JournalFormatter if os.environ.get("JOURNAL_STREAM") else logging.Formatter
    stream.setFormatter(formatter(JOURNAL_STREAM_FORMAT))
    logging.basicConfig(level=level, handlers=[stream], force=True)
