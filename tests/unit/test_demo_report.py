"""The demo's verdict and figures, from what the two sides said."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from migration.commands.demo_report import DemoRun
from migration.commands.drive import Progress

FIELDS = {
    "result",
    "kernel",
    "backing",
    "transport",
    "vcpus",
    "vcpu_backend",
    "ram_bytes",
    "downtime_ms",
    "total_ms",
    "page_requests",
    "requests_during_device_load",
    "duplicate_requests",
    "dirty_tracker",
    "collapse",
    "pages_copied",
    "pages_zero",
    "multifd_bytes",
    "fault_latency_us",
    "oracle",
}


@pytest.fixture
def run() -> DemoRun:
    run = DemoRun(
        argparse.Namespace(
            ram_bytes=64 << 20,
            backing="anon",
            smp=2,
            vcpu="thread",
            workload="zipf",
            transport="unix",
        )
    )
    run.source = {
        "status": "completed",
        "total-time": 90,
        "ram": {"total": 64 << 20},
        "x-postcopy": {"duplicate-requests": 3, "dirty-tracker": "wp-async"},
    }
    run.destination = {
        "status": "completed",
        "x-postcopy": {
            "page-requests": 11,
            "requests-during-device-load": 2,
            "pages-copied": 16000,
            "pages-zero": 384,
        },
    }
    run.machine = {
        "downtime_ms": 1.5,
        "fault_latency_us": {"p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0},
        "fault_latency_log2_us": [1, 0, 5] + [0] * 21,
        "touch_errors": 0,
    }
    run.survivor = "destination"
    run.oracle = {"pages_checked": 16384, "errors": 0, "bad": []}
    return run


def test_a_good_run(run: DemoRun) -> None:
    result: dict[str, Any] = run.result()
    assert set(result) == FIELDS
    assert result["result"] == "ok"
    assert set(result["fault_latency_us"]) == {"p50", "p90", "p99", "max"}
    assert result["oracle"] == {"pages_checked": 16384, "errors": 0}
    assert (result["page_requests"], result["duplicate_requests"]) == (11, 3)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("oracle", {"errors": 1}),
        ("oracle", {"pages_checked": 0}),
        ("source", {"status": "postcopy-paused"}),
        ("destination", {"status": "postcopy-active"}),
        ("machine", {"touch_errors": 1}),
    ],
)
def test_anything_wrong_fails_it(run: DemoRun, part: str, change: dict[str, object]) -> None:
    getattr(run, part).update(change)
    result = run.result()
    assert result["result"] == "failed"
    assert result["failures"]


def test_a_guest_left_at_the_source_fails_it(run: DemoRun) -> None:
    run.survivor = "source"
    assert run.result()["result"] == "failed"


def test_a_child_that_died_fails_it_once(run: DemoRun) -> None:
    run.errors.append("the source VM ended with status 1: no memory")
    run.note_exit("source", 1, "no memory")
    run.note_exit("destination", -9, "")
    assert run.errors == [
        "the source VM ended with status 1: no memory",
        "the destination VM ended with signal 9",
    ]


def test_nothing_known_is_still_an_object(run: DemoRun) -> None:
    empty = DemoRun(run._args)
    assert set(empty.result()) == FIELDS | {"failures"}
    assert empty.lanes() == []
    assert empty.latency_lines() == []


@pytest.mark.parametrize("moved_s", [0.0, 0.001, 0.3, 0.999, 1.0])
def test_the_picture_fits_wherever_the_guest_moved(run: DemoRun, moved_s: float) -> None:
    for seconds, status in ((0.0, "active"), (moved_s, "postcopy-active"), (1.0, "completed")):
        run.note(Progress(seconds, {"status": status}))
    lines = run.lanes()
    assert max(map(len, lines)) <= 86
    assert f"{moved_s * 1000:.0f} ms" in lines[3]
    assert lines[3].endswith("1000 ms")
