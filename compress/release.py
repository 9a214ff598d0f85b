"""The installed version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed


def version() -> str:
    """The distribution's version, "unknown" in a source tree that was never installed."""
    try:
        return installed("deltafold")
    except PackageNotFoundError:
        return "unknown"
