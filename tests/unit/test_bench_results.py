"""Figures from samples, and ratios from figures: pure arithmetic, no machine involved."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.bench.compare import Comparison, compare
from migration.bench.qemu import figures
from migration.bench.results import (
    GIB,
    Cost,
    Duration,
    Footprint,
    GuestLatency,
    Latency,
    Measurement,
    Skipped,
    Throughput,
    Value,
    percentile,
)
from migration.bench.tables import comparison_table, measurement_tables, migration_table

SAMPLES = st.lists(st.integers(1, 10**9), min_size=1, max_size=200)


@given(SAMPLES, st.floats(0.001, 1))
def test_percentile_is_the_nearest_rank(samples: list[int], quantile: float) -> None:
    """At least that share of the samples is not above it, and no smaller sample would do."""
    ordered = sorted(samples)
    found = percentile(ordered, quantile)
    assert found in ordered
    assert sum(sample <= found for sample in ordered) >= quantile * len(ordered)
    assert sum(sample < found for sample in ordered) < quantile * len(ordered)


@pytest.mark.parametrize(("samples", "quantile"), [([], 0.5), ([1], 0), ([1], 1.1)])
def test_percentile_refuses(samples: list[int], quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        percentile(samples, quantile)


@given(st.lists(SAMPLES, min_size=1, max_size=7))
def test_latency_is_ordered(runs: list[list[int]]) -> None:
    """Percentiles never cross, and the spread holds the median."""
    latency = Latency.from_runs(runs)
    in_order = [latency.min_us, latency.p50_us, latency.p90_us, latency.p99_us, latency.max_us]
    assert in_order == sorted(in_order)
    assert latency.p50_us_least <= latency.p50_us <= latency.p50_us_most
    assert latency.runs == len(runs)


def test_latency_in_microseconds() -> None:
    """100 samples of 1..100 us, three times; the slow run is an outlier the median ignores."""
    run = [us * 1000 for us in range(1, 101)]
    latency = Latency.from_runs([run, run, [10 * sample for sample in run]])
    assert (latency.p50_us, latency.p90_us, latency.p99_us) == (50.0, 90.0, 99.0)
    assert (latency.p50_us_least, latency.p50_us_most) == (50.0, 500.0)
    assert (latency.min_us, latency.max_us) == (1.0, 1000.0)


def test_empty_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs"):
        Latency.from_runs([])
    with pytest.raises(ValueError, match="samples"):
        Latency.from_runs([[]])
    with pytest.raises(ValueError, match="passes"):
        Throughput.from_passes([], 1)
    with pytest.raises(ValueError, match="passes"):
        Throughput.from_passes([0], 1)
    with pytest.raises(ValueError, match="runs"):
        Cost.from_runs([], GIB)
    with pytest.raises(ValueError, match="runs"):
        Duration.from_runs([])


def test_rates_and_costs() -> None:
    """1 GB in 1 s, 0.5 s and 0.25 s; 2 ms for a quarter of a GiB."""
    rate = Throughput.from_passes([10**9, 5 * 10**8, 25 * 10**7], 10**9)
    assert (rate.gb_per_s_least, rate.gb_per_s, rate.gb_per_s_most) == (1.0, 2.0, 4.0)
    assert Cost.from_runs([2_000_000], GIB // 4).ms_per_gib == 8.0


def _latency(p50_us: float) -> Latency:
    return Latency.from_runs([[round(p50_us * 1000)]])


def _rate(gb_per_s: float) -> Throughput:
    return Throughput.from_passes([round(10**9 / gb_per_s)], 10**9)


def _guest(p50_us: float, p99_us: float) -> GuestLatency:
    return GuestLatency(p50_us, p50_us, p99_us, p99_us, p50_us, p50_us, 100, 100, 1)


def _row(name: str, value: Value, placement: str = "same", **parameters: str | int) -> Measurement:
    return Measurement(name, value, parameters, placement)


LIMITS = [
    _row("remote_fault_floor", _latency(20), transport="unix", backing="anon"),
    _row("remote_fault_floor", _latency(60), "cross", transport="unix", backing="anon"),
    _row("remote_fault_floor", _latency(5), transport="unix", backing="anon", handler="spinning"),
    _row("socket_bulk", _rate(8), transport="unix", write_bytes=65536),
    _row("socket_bulk", _rate(9), "cross", transport="unix", write_bytes=65536),
    _row("copy_bulk", _rate(4), backing="anon", batch_bytes=65536),
    _row("copy_bulk", _rate(5), backing="shmem", batch_bytes=65536),
    _row("push_path", _rate(2), transport="unix", backing="anon"),
]
RUNTIME = [
    _row("guest_fault_idle_stream", _guest(28, 90), transport="unix", backing="anon"),
    _row("guest_fault_under_push", _guest(40, 200), transport="unix", backing="anon"),
    _row("push", _rate(1.5), transport="unix", backing="anon"),
    _row("downtime", Duration(4.0, 3.0, 5.0, 3), "chosen", transport="unix", guest="idle"),
    _row(
        "destination_memory", Footprint(1 << 20, 50 << 20, 1 << 30, 3), "chosen", transport="unix"
    ),
]


def _by_name(rows: list[Comparison]) -> dict[str, Comparison]:
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_each_figure_meets_its_limit() -> None:
    """The floor of the same placement (and not the spinning one), the slower of socket and COPY."""
    rows = _by_name(compare(LIMITS, RUNTIME))
    assert rows["idle_stream_fault_p50"].ratio == pytest.approx(28 / 20)
    assert rows["idle_stream_fault_p50"].is_met
    assert rows["under_push_fault_p99"].ratio == pytest.approx(5)
    assert not rows["under_push_fault_p99"].is_met
    assert rows["push_throughput"].ratio == pytest.approx(1.5 / 4)
    assert "UFFDIO_COPY in bulk" in rows["push_throughput"].limit_name
    assert not rows["push_throughput"].is_met
    assert rows["push_throughput_as_one_path"].ratio == pytest.approx(0.75)
    assert rows["push_throughput_as_one_path"].is_met
    assert rows["downtime"].is_met
    assert rows["destination_memory_above_idle"].ratio == pytest.approx(2**-10, abs=1e-4)


def test_what_was_not_measured_is_not_compared() -> None:
    """No limits: only what has a fixed aim. A skipped limit is no limit."""
    fixed = {"under_push_fault_p99", "downtime", "destination_memory_above_idle"}
    assert _by_name(compare([], RUNTIME)).keys() == fixed
    skipped = [_row("remote_fault_floor", Skipped("no"), transport="unix", backing="anon")]
    assert _by_name(compare(skipped, RUNTIME)).keys() == fixed
    assert compare(LIMITS, []) == []


def test_json_has_units_and_ratio() -> None:
    """Flat, with the unit in the name of every figure."""
    rows = [json.loads(json.dumps(row.to_json())) for row in compare(LIMITS, RUNTIME)]
    fault = next(row for row in rows if row["name"] == "idle_stream_fault_p50")
    assert fault["record"] == "comparison"
    assert (fault["reached_us"], fault["limit_us"]) == (28, 20)
    assert fault["ratio_aim_most"] == 1.5
    assert fault["met"] is True
    push = next(row for row in rows if row["name"] == "push_throughput")
    assert push["ratio_aim_least"] == 0.7
    assert {"reached_gb_per_s", "limit_gb_per_s"} <= push.keys()


def test_a_limit_of_nothing_is_no_division() -> None:
    assert math.isinf(Comparison("x", "", "us", 1, "", 0, 1).ratio)


def test_a_measurement_as_json() -> None:
    """A value's fields, or the reason why there is none; counts only where there are some."""
    done = Measurement("m", _rate(2), {"transport": "tcp"}, "cross", {"a": 1}, {"touches": 3})
    record = done.to_json("limit")
    assert record["gb_per_s"] == 2.0
    assert record["counts"] == {"touches": 3}
    assert record["cpus"] == {"a": 1}
    record = _row("m", Skipped("no pages", "buy some")).to_json("limit")
    assert (record["skipped"], record["remedy"]) == ("no pages", "buy some")
    assert "counts" not in record


def test_every_value_finds_a_table() -> None:
    """Nothing that was measured is left out of the text, nothing empty is in it."""
    rows = [*LIMITS, *RUNTIME, _row("scan", Cost(1, 1, 1, 1)), _row("x", Skipped("a|b"))]
    tables = measurement_tables("All", rows)
    assert sum(len(table.rows) for table in tables) == len(rows)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    markdown = "\n".join(table.to_markdown() for table in tables)
    assert "a\\|b" in markdown
    assert measurement_tables("None", []) == []
    table = comparison_table(compare(LIMITS, RUNTIME))[0]
    assert table.to_markdown().count("\n| ") == len(table.rows) + 2


def test_qemus_impossible_downtime_is_left_out() -> None:
    """7.2 answers a postcopy with the host's uptime; a pause longer than the whole is none."""
    answers = [{"total-time": 300, "downtime": 2860229}, {"total-time": 500, "downtime": 1}]
    row = figures("qemu", "postcopy", "unix", 10**9, answers)
    assert (row.total_ms, row.downtime_ms, row.gb_per_s) == (400, 1, 2.5)
    row = figures("qemu", "postcopy", "unix", 10**9, answers[:1])
    assert row.downtime_ms is None
    assert migration_table([row])[0].rows[0][-1] == "-"
