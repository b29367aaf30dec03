"""The plan of the limit rows: complete on this host, or with a reason; in turns; nothing left."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import pytest

from migration.bench.jobs import Job, run_all, why_skipped
from migration.bench.limits import Effort, measure_limits
from migration.bench.machine import Processors, choose_processors
from migration.bench.native import Transport
from migration.bench.results import Cost, Latency, Measurement, Skipped, Throughput
from tests.support.guestmem_memory import more_hugepages
from tests.support.leaks import no_leaks

pytestmark = pytest.mark.kernel

TINY = Effort(2, 40, 40, 1 << 20, 1 << 20, 4 << 20, 4 << 20)
TINY_FULL = Effort(1, 40, 40, 1 << 20, 1 << 20, 4 << 20, 4 << 20, is_full=True)

NAMES = {
    "wake_round_trip",
    "socket_round_trip",
    "fault_round_trip",
    "remote_fault_floor",
    "copy_bulk",
    "zeropage_bulk",
    "memcpy_bulk",
    "socket_bulk",
    "push_path",
    "pagemap_scan_clean",
    "pagemap_scan_written",
    "pagemap_scan_written_and_protect",
    "pagemap_first_write",
    "tracker_start",
    "tracker_sync_clean",
    "tracker_guest_writes",
    "tracker_sync_written",
}


def _assert_sane(row: Measurement) -> None:
    value = row.value
    if isinstance(value, Latency):
        ordered = [value.min_us, value.p50_us, value.p90_us, value.p99_us, value.max_us]
        assert ordered[0] > 0
        assert ordered == sorted(ordered), row
        assert value.p50_us_least <= value.p50_us <= value.p50_us_most
    elif isinstance(value, Throughput):
        assert 0 < value.gb_per_s_least <= value.gb_per_s <= value.gb_per_s_most, row
    elif isinstance(value, Cost):
        assert 0 < value.ms_per_gib_least <= value.ms_per_gib <= value.ms_per_gib_most, row
    else:
        raise AssertionError(f"not measured: {row}")


@pytest.mark.parametrize("effort", [TINY, TINY_FULL], ids=["normal", "full"])
def test_every_row_is_there_and_sane(effort: Effort, tmp_path: Path) -> None:
    """With hugepages nothing is skipped; every fault row counts as many messages as touches."""
    steps: Counter[str] = Counter()
    totals = set()

    def advance(job: Job, total: int) -> None:
        steps[job.name] += 1
        totals.add(total)

    with no_leaks(), more_hugepages(8, tmp_path / "journal"):
        rows = measure_limits(choose_processors(), effort, advance=advance)
    assert {row.name for row in rows} == NAMES
    assert totals == {sum(steps.values())} == {effort.runs * len(rows)}
    for row in rows:
        _assert_sane(row)
        if row.name in ("fault_round_trip", "remote_fault_floor"):
            assert row.counts["messages"] == row.counts["touches"] == row.counts["placed"] > 0
            assert row.counts["wrong"] == 0
    keys = Counter((row.key, row.placement) for row in rows)
    assert max(keys.values()) == 1, keys.most_common(1)


def test_one_processor_has_no_far_side() -> None:
    """Only "same" and "unpinned" rows, over the one transport that was asked for."""
    only = Processors(choose_processors().near, None)
    rows = measure_limits(only, TINY, [Transport.UNIX])
    assert {row.placement for row in rows} == {"same", "unpinned"}
    assert {row.parameters.get("transport", "unix") for row in rows} == {"unix"}


def test_turns_and_skips() -> None:
    """First runs before second runs; a row that fails once is not tried again, the others go on."""
    order: list[str] = []

    def sample(name: str) -> list[int]:
        order.append(name)
        if name == "bad":
            raise OSError(errno.EPERM, "no")
        return [1000]

    jobs = [
        Job("good", lambda: sample("good"), Latency.from_runs, 3),
        Job("bad", lambda: sample("bad"), Latency.from_runs, 3),
        Job("short", lambda: sample("short"), Latency.from_runs, 1),
    ]
    good, bad, short = run_all(jobs)
    assert order == ["good", "bad", "short", "good", "good"]
    assert isinstance(good.value, Latency)
    assert good.value.runs == 3
    assert isinstance(short.value, Latency)
    assert isinstance(bad.value, Skipped)
    assert bad.value.remedy is not None
    assert not bad.is_measured


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.EPERM, "userfaultfd"),
        (errno.ENOMEM, "hugepages reserve"),
        (errno.ENOSYS, "CONFIG_USERFAULTFD"),
        (errno.EIO, None),
    ],
)
def test_a_skip_names_its_remedy(number: int, word: str | None) -> None:
    remedy = why_skipped(OSError(number, "x")).remedy
    if word is None:
        assert remedy is None
    else:
        assert word in str(remedy)
