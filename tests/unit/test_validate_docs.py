"""docs/kernel-support.md speaks of the cases there are, all of them and no others."""

from __future__ import annotations

import re
from pathlib import Path

from scripts.validate.case import FAMILIES, select

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "kernel-support.md").read_text()
RESULTS = TEXT.partition("\n## Results\n")[2]


def _sections() -> dict[str, list[str]]:
    """Case names of each family's table."""
    found: dict[str, list[str]] = {}
    for part in RESULTS.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        if title in FAMILIES:
            rows = re.findall(r"^\| ([^|:(]+?)(?:: .*?| \(\d+ variants\))? \|", body, re.MULTILINE)
            found[title] = [row for row in rows[1:] if row != "---"]  # the first is the head
    return found


def test_every_case_is_in_the_table() -> None:
    wanted: dict[str, set[str]] = {}
    for case in select():
        wanted.setdefault(case.family, set()).add(case.name)
    assert {family: set(names) for family, names in _sections().items()} == wanted


def test_no_result_is_a_failure() -> None:
    assert "FAIL" not in RESULTS
    assert "| pass |" in RESULTS
