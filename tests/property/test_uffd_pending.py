"""The table of outstanding faults behaves like a dictionary from sleeper to page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from uffd import PendingFaults

ADDRESSES = st.integers(1, 16).map(lambda page: page << 12)
THREADS = st.integers(0, 5)
ADD = st.tuples(st.just("add"), ADDRESSES, THREADS)
REMOVE = st.tuples(st.just("remove"), ADDRESSES, st.integers(0, 4))


@given(st.lists(st.one_of(ADD, REMOVE), max_size=60))
def test_table_matches_a_model(steps: list[tuple[str, int, int]]) -> None:
    table = PendingFaults()
    model: dict[tuple[int, int], int] = {}  # sleeper -> address; nameless sleepers go by address
    for step, address, number in steps:
        if step == "add":
            assert table.add(address, number)
            model[(number, 0 if number else address)] = address
        else:
            length = number << 12
            gone = [k for k, v in model.items() if address <= v < address + length]
            for key in gone:
                del model[key]
            assert table.remove(address, length) == len(gone)
        assert len(table) == len(model)
        listed = sorted((o.thread_id or 0, o.address) for o in table.outstanding())
        assert listed == sorted((key[0], at) for key, at in model.items())
    oldest = table.oldest()
    assert (oldest is None) == (not model)


@given(st.integers(513, 600))
def test_a_full_table_drops_and_counts(count: int) -> None:
    table = PendingFaults()
    kept = sum(table.add(page << 12, page) for page in range(1, count + 1))
    assert kept == 512
    assert table.dropped == count - 512
    assert table.remove(0, 1 << 30) == 512
    assert len(table) == 0
    assert table.add(4096, 1)


def test_a_fault_reported_again_keeps_its_age() -> None:
    table = PendingFaults()
    table.add(4096, 7)
    first = table.outstanding()[0]
    table.add(4096, 7)
    assert table.outstanding() == [first]
    table.add(8192, 7)
    (moved,) = table.outstanding()
    assert moved.address == 8192
    assert moved.since_ns >= first.since_ns
