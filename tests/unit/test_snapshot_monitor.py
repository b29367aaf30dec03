"""Snapshots in the monitor: jobs, their table of states, and what ``info snapshots`` shows."""

from __future__ import annotations

import threading

import pytest

from migration.monitor.errors import QMPError
from migration.monitor.hmp_info import snapshots_text
from migration.monitor.jobs import JOBS_MAX, Jobs
from migration.runtime.snapshots.files import SnapshotError


class _Watcher:
    """Notes every step; waits for one."""

    def __init__(self, jobs: Jobs) -> None:
        self.steps: list[tuple[object, object]] = []
        self._changed = threading.Condition()
        jobs.on_change = self._note

    def _note(self, data: dict[str, object]) -> None:
        with self._changed:
            self.steps.append((data["id"], data["status"]))
            self._changed.notify_all()

    def wait(self, job: str, status: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (job, status) in self.steps, 30)


def test_a_job_goes_through_its_states() -> None:
    """Created, running, concluded, and null once it is dismissed."""
    jobs = Jobs()
    watcher = _Watcher(jobs)
    released = threading.Event()
    jobs.start("a", "snapshot-save", released.wait)
    watcher.wait("a", "running")
    assert jobs.query()[0]["status"] == "running"
    with pytest.raises(QMPError, match="cannot be dismissed"):
        jobs.dismiss("a")
    with pytest.raises(QMPError, match="already in use"):
        jobs.start("a", "snapshot-load", released.wait)
    released.set()
    watcher.wait("a", "concluded")
    jobs.dismiss("a")
    assert [status for _, status in watcher.steps] == ["created", "running", "concluded", "null"]
    assert jobs.query() == []


def test_a_job_keeps_its_error() -> None:
    """Typed errors as they are, anything else as our bug; it ends all the same."""

    def fail() -> None:
        raise SnapshotError("no room")

    def break_down() -> None:
        raise ZeroDivisionError("oops")

    jobs = Jobs()
    watcher = _Watcher(jobs)
    jobs.start("a", "snapshot-save", fail)
    jobs.start("b", "snapshot-load", break_down)
    for job in ("a", "b"):
        watcher.wait(job, "concluded")
    errors = {str(info["id"]): str(info["error"]) for info in jobs.query()}
    assert errors["a"] == "no room"
    assert "internal error" in errors["b"]
    assert ("a", "aborting") in watcher.steps


def test_jobs_nobody_dismisses_are_bounded() -> None:
    """A client that forgets them is told."""
    jobs = Jobs()
    watcher = _Watcher(jobs)
    for number in range(JOBS_MAX):
        jobs.start(str(number), "snapshot-save", lambda: None)
    with pytest.raises(QMPError, match="job-dismiss"):
        jobs.start("more", "snapshot-save", lambda: None)
    with pytest.raises(QMPError, match="Invalid job ID"):
        jobs.start("", "snapshot-save", lambda: None)
    with pytest.raises(QMPError, match="not found"):
        jobs.dismiss("nobody")
    for number in range(JOBS_MAX):
        watcher.wait(str(number), "concluded")


def test_the_table_of_snapshots() -> None:
    """One line each, also of one about which little is known."""
    assert "no snapshot" in snapshots_text([])
    text = snapshots_text(
        [
            {
                "name": "before-upgrade",
                "vm-state-size": 3 << 20,
                "date-sec": 1_700_000_000,
                "vm-clock-nsec": 3_723_045_000_000,
                "machine": "toy-1.1",
                "layout": "mapped-ram",
                "run-state": "paused",
            },
            {"name": "bare", "vm-state-size": 1, "date-sec": 0},
        ]
    )
    head, first, second = text.splitlines()
    assert head.split() == ["TAG", "VM", "SIZE", "DATE", "VM", "CLOCK", "KIND"]
    assert "before-upgrade" in first
    assert "3 MiB" in first
    assert "01:02:03.045" in first
    assert first.endswith("toy-1.1, mapped-ram, paused")
    assert second.endswith("-  without checksum")
