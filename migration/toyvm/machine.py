"""The toy VM: RAM, vCPUs and devices behind the :class:`migration.runtime.machine.Machine`
protocol."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Self
from uuid import UUID

from guestmem import Bitmap, DirtyTracker, RAMBlock, RAMList, preallocate
from migration.wire.registry import StateRegistry

from . import oracle
from ._native import lib
from .assembly import Devices, assemble
from .auxmem import AuxMemory
from .histogram import Latency
from .kvm import KvmMachine
from .options import ToyOptions, VCpuKind, Workload
from .oracle import SweepReport
from .runstate import RunState, advance
from .vcpu import ThreadVCpu, VCpu, VCpuStatistics

ReportPrealloc = Callable[[str, int, int], None]
"""``report(idstr, done, total)`` in bytes, from the thread that makes the machine."""


class ToyMachine:
    """One toy VM, allocated and (unless incoming) filled by the constructor; ended by
    :meth:`close`.

    :ivar options: what it was made from. :ivar ram: its blocks. :ivar registry: its device state.
    :ivar aux: the oracle's memory outside guest RAM. :ivar devices: the devices it has.

    Threads: :meth:`start`, :meth:`stop`, :meth:`attach_received` and :meth:`close` may be called
    from any thread, one lock serialises them. None of them touches guest RAM, so none waits for a
    missing page;
    :meth:`sweep` does. Native threads run the guest, without the GIL.
    """

    def __init__(
        self, options: ToyOptions | None = None, *, on_prealloc: ReportPrealloc | None = None
    ) -> None:
        """:param on_prealloc: told how far the preallocation of each block is.
        :raises OptionError, ValueError: options that do not fit together.
        :raises guestmem.GuestMemoryError: RAM cannot be had. :raises OSError: KVM or aux memory
            cannot.
        """
        self.options = options or ToyOptions()
        self._lock = threading.RLock()
        # Its own, so that whoever asks for figures never waits for a vCPU that is slow to stop.
        self._looking = threading.Lock()
        self._is_closed = False
        self.kvm: KvmMachine | None = None
        self._received: Mapping[str, Bitmap] = {}
        self._is_running = False
        self._run_state = RunState.INMIGRATE if self.options.incoming else RunState.PRELAUNCH
        with ExitStack() as stack:
            self._check_guard(stack)
            self.ram = RAMList(self._allocate(stack, on_prealloc))
            self._blocks = list(self.ram)
            self.aux = AuxMemory(self.options)
            stack.callback(self.aux.close)
            if not self.options.incoming:
                oracle.fill(self.aux, self._blocks)
            self.vcpus: list[VCpu] = self._make_vcpus(stack)
            self.registry = StateRegistry()
            self.devices: Devices = assemble(self, stack)
            self._resources = stack.pop_all()

    @staticmethod
    def _check_guard(stack: ExitStack) -> None:
        error = lib.guard_install()
        if error < 0:
            raise OSError(-error, os.strerror(-error), "installing the kick signal")
        stack.callback(lib.guard_uninstall)

    def _allocate(self, stack: ExitStack, on_prealloc: ReportPrealloc | None) -> Iterator[RAMBlock]:
        for idstr, length in self.options.blocks:
            backend = self.options.backend_of(idstr)
            block = backend.allocate(idstr, length)
            stack.callback(block.close)
            if backend.prealloc_threads:
                report = None if on_prealloc is None else partial(on_prealloc, idstr)
                preallocate(block, threads=backend.prealloc_threads, progress=report)
            yield block

    def _make_vcpus(self, stack: ExitStack) -> list[VCpu]:
        if self.options.vcpu is VCpuKind.KVM and self.options.smp:
            self.kvm = KvmMachine(self.aux, self._blocks, ring_entries=self.options.ring_entries)
            stack.callback(self.kvm.close)
            return list(self.kvm.vcpus)
        vcpus: list[VCpu] = []
        for index in range(self.options.smp):
            vcpu = ThreadVCpu(index, self.aux, self._blocks)
            stack.callback(vcpu.close)
            vcpus.append(vcpu)
        return vcpus

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what a migration needs ---------------------------------------------------------------

    @property
    def machine_type(self) -> str:
        """Name on the wire."""
        return self.options.machine_type

    @property
    def uuid(self) -> UUID | None:
        """The VM's, or None."""
        return self.options.uuid

    @property
    def needs_kernel_faults(self) -> bool:
        """KVM touches guest RAM from inside the kernel, which a user-mode-only userfaultfd does not
        see."""
        return self.options.vcpu is VCpuKind.KVM

    @property
    def run_state(self) -> str:
        """QEMU's name of the state. Assigning checks that it may follow the one there is.

        :raises migration.toyvm.runstate.RunStateError: it may not, or does not exist.
        """
        return self._run_state.value

    @run_state.setter
    def run_state(self, wanted: str) -> None:
        with self._lock:
            self._run_state = advance(self._run_state, wanted)

    def note_run_state(self, state: str) -> None:
        """Remember, for the wire, the state the guest had before a migration stopped it."""
        self.devices.global_state.run_state = state

    @property
    def incoming_run_state(self) -> str | None:
        """The state the guest had at the source, once that arrived; else ``None``."""
        state = self.devices.global_state
        return state.run_state if state.received else None

    @property
    def is_running(self) -> bool:
        """Between start and stop."""
        return self._is_running

    def start(self) -> None:
        """The vCPUs and devices run; the run state becomes ``running``. Harmless when they do."""
        with self._lock:
            if self._is_running:
                return
            self._run_state = advance(self._run_state, RunState.RUNNING)
            for vcpu in self.vcpus:
                vcpu.forget_first_op()
            self._go()
            self._is_running = True
            self.devices.on_start()

    def stop(self) -> None:
        """Returns when no vCPU and no device thread runs guest code; never waits for a missing
        page.

        The run state goes from ``running`` to ``paused``; set another one afterwards to say why.
        """
        with self._lock:
            if not self._is_running:
                return
            self._halt()
            self._is_running = False
            if self._run_state is RunState.RUNNING:
                self._run_state = RunState.PAUSED
            self.devices.on_stop()

    def _go(self) -> None:
        for vcpu in self.vcpus:
            vcpu.go()
        self.devices.go()

    def _halt(self) -> None:
        # All are asked before any is waited for: they park at the same time.
        for vcpu in self.vcpus:
            vcpu.ask_halt()
        for vcpu in self.vcpus:
            vcpu.halt()
        self.devices.halt()

    @contextmanager
    def _standstill(self) -> Iterator[None]:
        """Park the guest for a moment, whatever it does; the run state does not change."""
        with self._lock:
            if self._is_running:
                self._halt()
            try:
                yield
            finally:
                if self._is_running:
                    self._go()

    def vcpu_thread_ids(self) -> list[int]:
        """Kernel thread ids of the vCPUs, in order."""
        return [vcpu.thread_id for vcpu in self.vcpus]

    def hold(self, seconds: float) -> None:
        """Keep vCPUs and devices from running for so long; the run state does not change."""
        with self._standstill():
            time.sleep(seconds)

    def dirty_tracker(self) -> DirtyTracker:
        """A new tracker over all of RAM that sees what these vCPUs and devices write."""
        return self.devices.dirty_tracker(self)

    def attach_received(self, received: Mapping[str, Bitmap] | None) -> None:
        """From now on vCPUs time each touch of a page whose bit is clear, and count the others as
        hits.

        :param received: by idstr, a bit per target page; blocks left out are not timed. ``None``:
            none. The machine keeps them alive until they are replaced.
        :raises ValueError: a bitmap is too small for its block.
        """
        with self._standstill():
            maps = dict(received or {})
            for vcpu in self.vcpus:
                vcpu.set_received(maps)
            self._received = maps

    # -- what its owner asks ------------------------------------------------------------------

    def set_workload(self, workload: Workload, write_share: float) -> None:
        """Change what the vCPUs do, while they run."""
        self.aux.set_workload(workload, write_share)

    def set_rate(self, rate: int) -> None:
        """Operations per second of all vCPUs together (0 = unlimited), while they run."""
        self.aux.set_rate(rate)

    def set_stop_at(self, operations: int) -> None:
        """Each vCPU parks itself once it has done so many operations in its life; 0 = never."""
        self.aux.set_stop_at(operations)

    def sweep(self) -> SweepReport:
        """Judge every page of every block against the vCPUs' log and the devices' state.

        Sleeps on missing pages, without the GIL. :raises RuntimeError: the guest runs.
        """
        if self._is_running:
            raise RuntimeError("the guest runs: stop it before the sweep")
        owned = self.devices.owned_ranges()
        report = oracle.sweep(self.aux, self._blocks, owned, nothing_is_missing=not self._received)
        for part in self.devices.sweep(self._blocks):
            report += part
        return report

    def latency(self) -> Latency:
        """All vCPUs' latency histograms in one."""
        return Latency.merge(vcpu.latency for vcpu in self.vcpu_statistics())

    def downtime_ns(self) -> int | None:
        """From the last guest operation at the source to the first one here, by the guest's clock.

        ``None`` until every vCPU came from somewhere and one of them did something.
        """
        offset = time.time_ns() - time.monotonic_ns()
        firsts = [s.first_op_ns for s in self.vcpu_statistics() if s.first_op_ns]
        if not firsts or not self.devices.cpus:
            return None
        first = min(firsts)
        gaps = [cpu.downtime_ns(first, first + offset) for cpu in self.devices.cpus]
        # The smallest gap belongs to the vCPU that ran longest at the source.
        return min((gap for gap in gaps if gap is not None), default=None)

    def vcpu_statistics(self) -> list[VCpuStatistics]:
        """One entry for each vCPU; may be asked while they run.

        :raises RuntimeError: the machine was closed: what they counted in is gone.
        """
        with self._looking:
            if self._is_closed:
                raise RuntimeError("the machine was closed")
            return [vcpu.statistics() for vcpu in self.vcpus]

    def statistics(self) -> dict[str, object]:
        """Figures for a report, JSON-ready; may be asked while the guest runs.

        ``fault_latency_us`` are the touches of pages not yet received, ``hits`` the touches of
        received ones.
        """
        vcpus = self.vcpu_statistics()
        latency = Latency.merge(vcpu.latency for vcpu in vcpus)
        downtime_ns = self.downtime_ns()
        return {
            "machine_type": self.machine_type,
            "run_state": self.run_state,
            "vcpu_backend": self.options.vcpu.value,
            "vcpus": [_vcpu_json(vcpu) for vcpu in vcpus],
            "ops": sum(vcpu.ops for vcpu in vcpus),
            "writes": sum(vcpu.writes for vcpu in vcpus),
            "hits": sum(vcpu.hits for vcpu in vcpus),
            "misses": sum(vcpu.misses for vcpu in vcpus),
            "touch_errors": sum(vcpu.errors for vcpu in vcpus),
            "lost_vcpus": sum(vcpu.status != "ready" for vcpu in vcpus),
            "fault_latency_us": latency.summary_us(),
            "downtime_ms": None if downtime_ns is None else downtime_ns / 1e6,
            **self.devices.statistics(),
        }

    def close(self) -> None:
        """Stop the guest, end its threads, give back all memory and files. Harmless the second
        time."""
        with self._lock:
            if self._is_running:
                self._halt()
                self._is_running = False
            with self._looking:
                self._is_closed = True
            self._resources.close()


def _vcpu_json(vcpu: VCpuStatistics) -> dict[str, object]:
    return {
        "index": vcpu.index,
        "status": vcpu.status,
        "ops": vcpu.ops,
        "hits": vcpu.hits,
        "misses": vcpu.misses,
        "errors": vcpu.errors,
        "fault_latency_us": vcpu.latency.summary_us(),
    }
