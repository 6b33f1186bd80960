"""One module for each target."""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """The names of all targets."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
