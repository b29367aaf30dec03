"""What each dirty tracker costs: to start, to look when nothing and when everything was written,
and what the guest pays for its first write to a page it watches."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from guestmem import Bitmap, DirtyTracker, TrackerKind, WpAsyncTracker
from migration.toyvm import ToyMachine, ToyOptions, TrackerChoice, VCpuKind
from migration.toyvm.options import DEFAULT_DIRTY_RING_SIZE, Workload

from .jobs import Job, jobs_of_one_run

_WAIT_S = 0.0005
_WRITES_TIMEOUT_S = 120.0

TRACKERS: Sequence[tuple[VCpuKind, TrackerKind]] = (
    (VCpuKind.THREAD, TrackerKind.NONE),
    (VCpuKind.THREAD, TrackerKind.WP_ASYNC),
    (VCpuKind.THREAD, TrackerKind.WP_SYNC),
    (VCpuKind.KVM, TrackerKind.NONE),
    (VCpuKind.KVM, TrackerKind.WP_ASYNC),
    (VCpuKind.KVM, TrackerKind.WP_SYNC),
    (VCpuKind.KVM, TrackerKind.KVM_LOG),
    (VCpuKind.KVM, TrackerKind.KVM_RING),
)


@dataclass(frozen=True, slots=True)
class TrackerRun:
    """Nanoseconds. :ivar writes_ns: the guest wrote every page once, in order."""

    start_ns: int
    clean_ns: int
    writes_ns: int
    written_ns: int


def measure_tracker(vcpu: VCpuKind, kind: TrackerKind, length: int) -> TrackerRun:
    """One guest of ``length`` bytes of anonymous RAM with one vCPU, watched from start to stop.

    :param kind: ``NONE``: nobody watches; only ``writes_ns`` says something then.
    :raises OSError: ENODEV: no KVM; ENOTSUP: this kernel has no such tracker; EBADMSG: the tracker
        did not see what was written.

    Blocks for about a second a GiB; the GIL is free while the guest writes and the kernel looks.
    """
    _check_host(vcpu, kind)
    with ExitStack() as stack:
        machine = stack.enter_context(ToyMachine(_options(vcpu, kind, length)))
        tracker = None if kind is TrackerKind.NONE else machine.dirty_tracker()
        found = {block.idstr: Bitmap(block.page_count) for block in machine.ram}
        start_ns = clean_ns = written_ns = 0
        if tracker is not None:
            stack.callback(tracker.stop)
            start_ns = _timed(tracker.start)
            clean_ns = _timed(lambda: tracker.sync(found))
        writes_ns = _timed(lambda: _write_all(machine))
        if tracker is not None:
            written_ns = _timed(lambda: _sync_all(tracker, found))
    return TrackerRun(start_ns, clean_ns, writes_ns, written_ns)


def _check_host(vcpu: VCpuKind, kind: TrackerKind) -> None:
    if vcpu is VCpuKind.KVM and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise OSError(errno.ENODEV, "no /dev/kvm that we may use")
    if kind is TrackerKind.WP_ASYNC and not WpAsyncTracker.works_here():
        raise OSError(errno.ENOTSUP, "this kernel has no asynchronous write protection (Linux 6.7)")


def _options(vcpu: VCpuKind, kind: TrackerKind, length: int) -> ToyOptions:
    is_none = kind is TrackerKind.NONE
    return ToyOptions(
        ram_bytes=length,
        vcpu=vcpu,
        workload=Workload.SEQUENTIAL,
        write_share=1.0,
        ring_pages=0,
        dirty_ring_size=DEFAULT_DIRTY_RING_SIZE if kind is TrackerKind.KVM_RING else 0,
        dirty_tracker=TrackerChoice.AUTO if is_none else TrackerChoice(kind.value),
    )


def _write_all(machine: ToyMachine) -> None:
    pages = sum(block.page_count for block in machine.ram)
    machine.set_stop_at(pages)
    machine.start()
    until = time.monotonic() + _WRITES_TIMEOUT_S
    while any(vcpu.ops < pages for vcpu in machine.vcpu_statistics()):
        if time.monotonic() > until:
            raise OSError(errno.ETIMEDOUT, f"the guest did not write {pages} pages")
        time.sleep(_WAIT_S)
    machine.stop()


def _sync_all(tracker: DirtyTracker, found: dict[str, Bitmap]) -> None:
    pages = tracker.sync(found)
    if pages != sum(bitmap.nbits for bitmap in found.values()):
        raise OSError(errno.EBADMSG, f"{tracker.kind}: {pages} pages seen, all were written")


def _timed(action: Callable[[], object]) -> int:
    began = time.monotonic_ns()
    action()
    return time.monotonic_ns() - began


def tracker_jobs(length: int, runs: int) -> Iterator[Job]:
    """The rows of every tracker, whether or not this host has it."""
    for vcpu, kind in TRACKERS:
        is_none = kind is TrackerKind.NONE
        yield from jobs_of_one_run(
            partial(measure_tracker, vcpu, kind, length),
            {"guest_writes": _FIGURES["guest_writes"]} if is_none else _FIGURES,
            length,
            runs,
            prefix="tracker_",
            parameters={"tracker": kind.value, "vcpu": vcpu.value},
        )


_FIGURES: dict[str, Callable[[TrackerRun], int]] = {
    "start": lambda run: run.start_ns,
    "sync_clean": lambda run: run.clean_ns,
    "guest_writes": lambda run: run.writes_ns,
    "sync_written": lambda run: run.written_ns,
}
