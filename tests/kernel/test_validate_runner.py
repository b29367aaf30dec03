"""A case that hangs, dies or says nothing is one failure, told with its reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.process import tied_to_us

pytestmark = pytest.mark.kernel


def _result(name: str) -> dict[str, object]:
    # Reading to the end also waits for everybody who holds the pipe: what a case left behind.
    done = subprocess.run(
        tied_to_us([sys.executable, "-m", "tests.support.validate_bodies", name]),
        stdout=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
        timeout=60,
        check=True,
    )
    record: dict[str, object] = json.loads(done.stdout)
    return record


def test_what_passes_tells_its_checks_and_remarks() -> None:
    record = _result("passes")
    assert (record["status"], record["checks"], record["remarks"]) == ("pass", 1, ["seen"])


def test_checking_nothing_is_a_failure() -> None:
    record = _result("checks_nothing")
    assert (record["status"], record["reason"]) == ("fail", "the case checked nothing")


def test_a_difference_is_told_by_its_first_byte() -> None:
    record = _result("differs")
    assert record["status"] == "fail"
    assert record["reason"] == "contents: byte 0x40 is 0x01, not 0x00"


def test_a_skip_keeps_its_remedy() -> None:
    record = _result("skips")
    assert (record["status"], record["reason"], record["remedy"]) == ("skip", "not here", "do that")


def test_death_by_a_signal_is_a_failure_of_that_case() -> None:
    record = _result("dies")
    assert record["status"] == "fail"
    assert str(record["reason"]).startswith("died of SIGSEGV")
    assert "touch.py" in str(record["reason"])


def test_a_hang_on_a_missing_page_ends_with_a_traceback() -> None:
    record = _result("hangs")
    assert record["status"] == "fail"
    assert str(record["reason"]).startswith("hung: no answer within 0.5 s")
    assert "touch.py" in str(record["reason"])


def test_what_a_case_leaves_behind_dies_with_it() -> None:
    assert _result("leaves_a_child")["status"] == "pass"
