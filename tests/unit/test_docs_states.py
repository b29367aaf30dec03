"""The drawn states are those of the tables."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_current() -> None:
    """After a change of a table: ``make docs``."""
    drawing = runpy.run_path(str(DOCS / "draw_states.py"))
    assert (DOCS / "states.md").read_text() == drawing["page"]()
