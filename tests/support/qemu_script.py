"""QEMU's own analysis script, as ``scripts/fetch-qemu-script`` got it out of Debian's sources.

``QEMU_ANALYZE_SCRIPT`` names another copy. The script is no part of this project.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.need import need

VARIABLE = "QEMU_ANALYZE_SCRIPT"
SUITES = {"7.2": "bookworm", "10.0": "bookworm-backports"}
"""Which QEMU's script lies in which folder of the cache."""


def analysis_script(version: str) -> Path:
    """The script of QEMU 7.2 or 10.0; the test is skipped where there is none."""
    given = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postcopy"
    path = Path(given or cache / "qemu-script" / SUITES[version] / "analyze-migration.py")
    # No remedy for need(): without a mirror of Debian's sources there is none.
    need(
        path.is_file(),
        f"no analysis script of QEMU {version}: scripts/fetch-qemu-script gets it where there is a "
        f"mirror of Debian's sources, or {VARIABLE} names one",
    )
    return path
