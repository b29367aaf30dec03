"""Run states, options and histograms of the toy VM."""

from __future__ import annotations

import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.toyvm import (
    MACHINE_TYPES,
    Latency,
    OptionError,
    RunState,
    RunStateError,
    ToyMachine,
    ToyOptions,
)
from migration.toyvm._native import lib
from migration.toyvm.histogram import BUCKETS, bucket_top_ns
from migration.toyvm.runstate import TRANSITIONS, advance
from migration.wire.globalstate import RUN_STATES


@given(st.sampled_from(RunState), st.sampled_from([*RunState, "dancing"]))
def test_every_run_state_either_follows_or_is_refused(actual: RunState, wanted: str) -> None:
    if wanted == actual or wanted in TRANSITIONS[actual]:
        assert advance(actual, wanted) == wanted
    else:
        with pytest.raises(RunStateError, match=actual.value):
            advance(actual, wanted)


def test_run_states_are_those_of_the_wire() -> None:
    assert {state.value for state in RunState} <= RUN_STATES


def test_a_machine_walks_its_run_states() -> None:
    with ToyMachine(ToyOptions(ram_bytes=1 << 20)) as machine:
        assert machine.run_state == "prelaunch"
        machine.start()
        machine.start()
        assert machine.run_state == "running"
        machine.stop()
        assert machine.run_state == "paused"
        machine.run_state = "finish-migrate"
        machine.run_state = "running"
        machine.start()
        assert machine.is_running
    with ToyMachine(ToyOptions(ram_bytes=1 << 20, incoming=True)) as machine:
        assert machine.run_state == "inmigrate"


@pytest.mark.parametrize(
    "options",
    [
        {"machine_type": "pc"},
        {"smp": 65},
        {"write_share": 1.5},
        {"ring_pages": 8},
        {"ram_bytes": 5000},
        {"ram_bytes": 1 << 16},
        {"extra_blocks": (("toy.ram", 4096),)},
        {"machine_type": "none", "smp": 1},
    ],
)
def test_impossible_options_are_refused_early(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        ToyOptions(**options)  # type: ignore[arg-type]


def test_more_vcpus_than_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="each needs one"):
        ToyMachine(ToyOptions(ram_bytes=1 << 20, smp=4, working_set_bytes=8192))


@pytest.mark.parametrize("machine_type", MACHINE_TYPES)
def test_machine_types_have_their_sections(machine_type: str) -> None:
    smp = 0 if machine_type == "none" else 2
    with ToyMachine(ToyOptions(ram_bytes=1 << 20, machine_type=machine_type, smp=smp)) as machine:
        names = [entry.idstr for entry in machine.registry]
        assert names[0] == "timer"
        assert names[-1] == "globalstate"
        if machine_type == "none":
            assert len(names) == 2
            assert [block.idstr for block in machine.ram] == ["ram"]


@given(st.integers(0, (1 << 41) - 1))
def test_a_bucket_holds_its_value_within_its_width(ns: int) -> None:
    bucket = lib.toy_bucket_of(ns)
    assert bucket < BUCKETS
    assert ns <= bucket_top_ns(bucket) <= max(ns, ns * 33 // 32)


def test_buckets_tile_all_values() -> None:
    tops = [bucket_top_ns(bucket) for bucket in range(BUCKETS)]
    assert tops == sorted(set(tops))
    assert lib.toy_bucket_of(1 << 60) == BUCKETS - 1


@given(
    st.lists(st.integers(0, 10_000_000), min_size=1, max_size=200), st.sampled_from([50, 90, 99])
)
def test_percentiles_are_nearest_rank_within_a_bucket(values: list[int], percent: int) -> None:
    buckets = [0] * BUCKETS
    for value in values:
        buckets[lib.toy_bucket_of(value)] += 1
    latency = Latency(len(values), sum(values), max(values), buckets)
    exact = sorted(values)[max(1, -(-len(values) * percent // 100)) - 1]
    assert exact <= latency.percentile_ns(percent) <= max(exact * 33 // 32, 0)


def test_merging_histograms_adds_them_up() -> None:
    def of(value: int) -> Latency:
        buckets = [0] * BUCKETS
        buckets[lib.toy_bucket_of(value)] = 1
        return Latency(1, value, value, buckets)

    merged = Latency.merge([of(10), of(1000)])
    assert (merged.count, merged.sum_ns, merged.max_ns) == (2, 1010, 1000)
    assert merged.percentile_ns(50) == 10
    assert merged.percentile_ns(100) == 1000
    assert Latency.merge([]).percentile_ns(50) == 0


def test_zipf_prefers_few_pages_and_reaches_many() -> None:
    from migration.toyvm import Workload
    from tests.support.toyvm_machines import run_some

    options = ToyOptions(ram_bytes=4 << 20, workload=Workload.ZIPF, write_share=1, ring_pages=0)
    with ToyMachine(options) as machine:
        run_some(machine, 200_000)
        log = memoryview(bytes(machine.aux.log(0))).cast("I")
        counts = sorted(log)
        total = sum(counts)
        assert sum(counts[-len(counts) // 100 :]) > total / 3
        assert bisect.bisect(counts, 0) < len(counts) // 10
