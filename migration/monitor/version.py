"""What the monitor says it is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

QEMU_SURFACE = {"major": 11, "minor": 1, "micro": 0}
"""The QEMU release whose migration commands, parameters and events this monitor follows.

Clients choose what to ask for by this number; ``package`` tells them who answers.
"""


def package() -> str:
    """Our own name and version."""
    try:
        return f"postcopy {installed_version('postcopy')}"
    except PackageNotFoundError:
        return "postcopy (from a source tree)"


def version() -> dict[str, object]:
    """The ``version`` object of the greeting and of ``query-version``."""
    return {"qemu": dict(QEMU_SURFACE), "package": package()}
