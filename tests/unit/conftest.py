"""For property tests: how long one example takes is the machine's business, not the code's."""

from __future__ import annotations

from hypothesis import settings

# pytest-timeout bounds the whole test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
