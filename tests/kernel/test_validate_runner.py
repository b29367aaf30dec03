"""A case that hangs, dies or says nothing is one failure, told with its reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from guestmem.hugejournal import HugepageJournal
from tests.support.need import need
from tests.support.process import end, tied_to_us
from tests.support.validate import SCRIPT

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


def test_being_told_to_end_gives_everything_back() -> None:
    """SIGTERM in the middle of a case that has swap and huge pages."""
    need(os.geteuid() == 0, "huge pages and swap", remedy="run as root")
    devices = set(os.listdir("/sys/block"))
    command = [sys.executable, str(SCRIPT), "--journal", tempfile.gettempdir(), "--hugepages", "2"]
    patterns = ["--only", "unit/copy[[]hugetlb]", "--only", "mremap-wp/*swapped*"]
    process = subprocess.Popen(tied_to_us([*command, *patterns]), stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if b"swapped" in line:  # one such case is over, so the device is there
            break
    assert end(process, timeout_s=60) in (0, 128 + signal.SIGTERM)  # 0: it was faster
    left = [t for t in HugepageJournal(Path(tempfile.gettempdir())).entries() if t.owner]
    assert process.pid not in {t.owner[0] for t in left if t.owner}
    assert set(os.listdir("/sys/block")) <= devices
