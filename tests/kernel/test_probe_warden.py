"""The probe's child with checks that crash, hang, leave and lie: each loses its own row only."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from migration.probe import Cause, Limits, ProbeError, Row, Status, UnknownRow, run_checks
from tests.support.probe_checks import CATALOGUE, PIDS_VARIABLE

pytestmark = pytest.mark.kernel


MISBEHAVING = (
    *("good", "crash", "hang", "leave", "fail", "deny", "refused", "talk", "ramble"),
    "last",
)
# Long enough for a fork on a busy host, short enough to wait for once per test.
SHORT = Limits(timeout_s=1.0)


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the hanging check leaves its pids."""
    path = tmp_path / "pids"
    monkeypatch.setenv(PIDS_VARIABLE, str(path))
    return path


def ask(*words: str, limits: Limits = SHORT) -> dict[str, Row]:
    """Rows by name."""
    found = run_checks(words or None, catalogue=CATALOGUE, limits=limits)
    return {row.name: row for row in found.rows}


def wait_for_end(pid: int) -> None:
    """Until the process is gone, by its pidfd."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 20)[0], f"process {pid} lives on"
    finally:
        os.close(pidfd)


def test_misbehaving_checks_lose_their_own_rows(pids: Path) -> None:
    """And the good ones among them keep theirs, in the catalogue's order."""
    before = sorted(os.listdir("/proc/self/fd"))
    others = psutil.Process().children()  # of other tests, which keep them for their next run
    rows = ask(*MISBEHAVING)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert psutil.Process().children() == others
    assert next(iter(rows)) == "good"
    assert list(rows)[-1] == "last"
    for name in ("good", "talk", "ramble", "last"):
        assert rows[name].is_yes, rows[name]
    lost = {name: row.reason for name, row in rows.items() if row.outcome.cause is Cause.LOST}
    assert lost == {
        "crash": "lost: the check was ended by SIGSEGV",
        "hang": "lost: no answer within 1 s",
        "leave": "lost: the check ended with status 7 and no answer",
        "fail": "lost: the check failed: RuntimeError: a mistake of two lines",
    }
    assert all(rows[name].status is Status.UNTESTED for name in lost)
    assert rows["deny"].outcome.cause is Cause.PERMISSION
    assert rows["refused"].reason == "setting: switched off"
    assert rows["refused"].outcome.remedy == "switch it on"


def test_a_hanging_check_is_ended_with_its_children(pids: Path) -> None:
    """Nobody is left behind to hold memory or huge pages."""
    rows = ask("hang", "good")
    assert rows["hang"].outcome.cause is Cause.LOST
    assert rows["good"].is_yes
    for pid in pids.read_text().split():
        wait_for_end(int(pid))


def test_answers_are_of_bounded_length() -> None:
    """A letter has lines, not pages."""
    assert 0 < len(ask("ramble")["ramble"].outcome.detail) <= 500


def test_one_at_a_time_is_enough(pids: Path) -> None:
    """Checks wait for each other and none is forgotten."""
    rows = ask("hang", "good", "last", limits=Limits(timeout_s=0.5, parallel=1))
    assert [row.is_yes for row in rows.values()] == [True, False, True]


def test_a_host_where_all_hangs_is_given_up(pids: Path) -> None:
    """Rather than waiting for each in turn."""
    limits = Limits(timeout_s=0.2, parallel=1)
    rows = ask("hang*", "last", limits=limits)
    hung = [row for row in rows.values() if "no answer within" in (row.reason or "")]
    assert len(hung) == limits.hangs_max + 1
    assert rows["last"].reason == "lost: not asked: too many others hung"


def test_no_row_by_that_name() -> None:
    with pytest.raises(UnknownRow) as caught:
        ask("godo")
    assert caught.value.word == "godo"
    assert caught.value.nearest == ("good",)


def test_a_child_that_cannot_start_is_one_error() -> None:
    """Not a hundred lost rows."""
    with pytest.raises(ProbeError, match="ModuleNotFoundError"):
        run_checks(catalogue="tests.support.no_such_module:checks")


@contextlib.contextmanager
def hanging(pids: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A warden of our own whose one check hangs for good, and the pids of that check."""
    request = {
        "catalogue": CATALOGUE,
        "words": ["hang"],
        "user": None,
        "parallel": 2,
        "timeout_s": 300,
        "hangs_max": 9,
        "thorough": False,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "migration.probe.warden"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as warden:
        assert warden.stdin is not None
        warden.stdin.write(json.dumps(request).encode() + b"\n")
        warden.stdin.flush()
        # A FIFO: the check writes its pids when all of it hangs.
        yield warden, [int(pid) for pid in pids.read_text().split()]


def test_everything_ends_when_the_asker_is_gone(pids: Path) -> None:
    """Its end of the pipe is all the child watches."""
    os.mkfifo(pids)
    with hanging(pids) as (warden, children):
        assert warden.stdin is not None
        warden.stdin.close()
        assert warden.wait(20) == 0
    for pid in children:
        wait_for_end(pid)


def test_a_killed_warden_takes_its_check_along(pids: Path) -> None:
    """The kernel sees to it, not the warden."""
    os.mkfifo(pids)
    with hanging(pids) as (warden, (check, started)):
        warden.kill()
    wait_for_end(check)
    # What a check itself starts has to ask for the same; this one has not.
    with contextlib.suppress(ProcessLookupError):
        os.kill(started, signal.SIGKILL)
