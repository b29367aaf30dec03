"""The native measurements on the real kernel: sane, complete, and of what they claim to be.

No time is judged. What can be counted is: a touch that was not a fault, a page that was not placed
or carried other bytes would show in the counts.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from migration.bench import choose_placement, native
from migration.bench.machine import choose_processors, describe, free_hugepages_2m
from migration.bench.native import Backing, FaultConfig, PlaceOp, Transport
from migration.bench.peer import page_server
from tests.support.guestmem_memory import HUGE, more_hugepages
from tests.support.leaks import no_leaks
from tests.support.need import need

pytestmark = pytest.mark.kernel

PAGES, WARMUP, TOUCHES = 48, 5, 100  # the region is touched, discarded and touched again


@pytest.fixture(autouse=True)
def _nothing_left() -> object:
    with no_leaks():
        yield


@pytest.fixture(params=list(Backing), ids=lambda backing: backing.name.lower())
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """Each kind of memory, with hugepages for hugetlb."""
    if request.param is not Backing.HUGETLB:
        yield request.param
        return
    with more_hugepages(8, tmp_path / "journal"):
        yield request.param


def _config(backing: Backing = Backing.ANON, **options: object) -> FaultConfig:
    pages = 4 if backing is Backing.HUGETLB else PAGES
    return FaultConfig(
        backing=backing,
        region_pages=pages,
        warmup=WARMUP,
        touches=TOUCHES // 10 if backing is Backing.HUGETLB else TOUCHES,
        **options,  # type: ignore[arg-type]
    )


def _assert_every_touch_was_a_fault(run: native.FaultRun, config: FaultConfig) -> None:
    assert run.touches == WARMUP + config.touches
    assert run.messages == run.touches
    assert run.placed == run.touches
    assert run.wrong == 0
    assert 0 < run.reads <= run.messages
    assert len(run.samples_ns) == config.touches
    assert min(run.samples_ns) > 0


@pytest.mark.parametrize("spins", [False, True], ids=["sleeping", "spinning"])
def test_every_local_touch_faults(backing: Backing, spins: bool) -> None:
    config = _config(backing, handler_spins=spins)
    _assert_every_touch_was_a_fault(native.fault_round_trip(config), config)


@pytest.mark.parametrize("transport", list(Transport), ids=lambda one: one.name.lower())
def test_every_remote_touch_faults(transport: Transport, backing: Backing) -> None:
    config = _config(backing, transport=transport)
    _assert_every_touch_was_a_fault(native.remote_fault(config), config)


@pytest.mark.parametrize("transport", list(Transport), ids=lambda one: one.name.lower())
def test_a_peer_process_serves_more_than_one_run(transport: Transport) -> None:
    config = _config(transport=transport)
    with page_server(
        transport, page_bytes=config.backing.page_bytes, pages=config.region_pages
    ) as near:
        for _ in range(2):
            run = native.remote_fault(config, near.fileno())
            _assert_every_touch_was_a_fault(run, config)


def test_a_peer_with_too_few_pages_is_an_error_and_no_hang() -> None:
    """The sleeping toucher is let go, the peer's own reason is told."""
    config = _config()
    with (
        pytest.raises(RuntimeError, match="Protocol error"),
        page_server(Transport.UNIX, page_bytes=config.backing.page_bytes, pages=2) as near,
        pytest.raises(OSError, match="remote fault"),
    ):
        native.remote_fault(config, near.fileno())


def test_samples_of_a_socket() -> None:
    for transport in Transport:
        samples = native.socket_round_trip(
            transport,
            request_bytes=16,
            reply_bytes=5000,
            client_cpu=native.UNPINNED,
            server_cpu=native.UNPINNED,
            rounds=50,
        )
        assert len(samples) == 50
        assert min(samples) > 0


def test_bulk_passes(backing: Backing) -> None:
    """Every operation this backing has; each pass took time."""
    batch = backing.page_bytes
    for op in PlaceOp:
        if backing is Backing.HUGETLB and op is PlaceOp.ZEROPAGE:
            with pytest.raises(OSError, match="ZEROPAGE") as caught:
                native.place(backing, op, batch_bytes=batch, length=batch, passes=1, cpu=-1)
            assert caught.value.errno == errno.EINVAL  # hugetlb knows no ZEROPAGE
            continue
        times = native.place(backing, op, batch_bytes=batch, length=4 * batch, passes=3, cpu=-1)
        assert len(times) == 3
        assert min(times) > 0


def test_bulk_over_sockets() -> None:
    for transport in Transport:
        sent = native.socket_bulk(
            transport,
            write_bytes=8192,
            pass_bytes=1 << 20,
            passes=2,
            sender_cpu=-1,
            receiver_cpu=-1,
        )
        pushed = native.push(
            transport, Backing.SHMEM, length=1 << 20, passes=2, sender_cpu=-1, receiver_cpu=-1
        )
        assert min(*sent, *pushed) > 0


def test_the_scan_sees_what_was_written(backing: Backing) -> None:
    """Nothing right after protection, every page after writing each."""
    length = 4 * HUGE if backing is Backing.HUGETLB else 1 << 20
    try:
        run = native.pagemap_scan(backing, length=length, cpu=-1)
    except OSError as error:
        need(error.errno not in (errno.ENOTTY, errno.EINVAL), "no PAGEMAP_SCAN (Linux 6.7)")
        raise
    assert run.clean_pages == 0
    assert run.dirty_pages == length // Backing.ANON.page_bytes
    assert min(run.clean_ns, run.dirty_get_ns, run.dirty_protect_ns, run.write_ns) > 0


def test_an_empty_pool_is_no_memory(tmp_path: Path) -> None:
    """Told before the first fault, by the mapping, not by a hang or a SIGBUS."""
    need(Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists(), "no 2 MiB pages")
    pages = free_hugepages_2m() + 4096
    with pytest.raises(OSError, match="local fault") as caught:
        native.fault_round_trip(FaultConfig(backing=Backing.HUGETLB, region_pages=pages))
    assert caught.value.errno == errno.ENOMEM


def test_a_processor_that_is_not_there() -> None:
    with pytest.raises(OSError, match="wake-up") as caught:
        native.wake_round_trip(0, 1023, rounds=1)
    assert caught.value.errno == errno.EINVAL


def test_the_budget_bounds_the_samples() -> None:
    cpu = max(os.sched_getaffinity(0))
    assert len(native.wake_round_trip(cpu, cpu, rounds=1000, budget_ns=1)) == 1
    assert len(native.wake_round_trip(cpu, cpu, rounds=7)) == 7


def test_a_placement_comes_with_its_reason() -> None:
    """Whatever this machine is like: usable processors, and the figures it rests on."""
    before = os.sched_getaffinity(0)
    placement = choose_placement(budget_ms=5)
    assert os.sched_getaffinity(0) == before
    assert placement.fault_cpus
    assert set(placement.fault_cpus) | set(placement.data_cpus) <= before
    assert placement.reason
    if len(before) > 1:
        assert [cost.is_same for cost in placement.measured].count(True) == 1
        assert len(placement.measured) > 1
        for cost in placement.measured:
            assert 0 < cost.p50_ns <= cost.p90_ns
            assert cost.samples > 0


def test_the_machine_in_words() -> None:
    machine = describe(choose_processors())
    assert machine.kernel == os.uname().release
    assert machine.clock_read_ns > 0
    record = machine.to_json()
    assert record["cpus"] == list(machine.cpus)
