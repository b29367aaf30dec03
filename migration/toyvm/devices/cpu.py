"""One vCPU's state on the wire: where its workload stands, what it expects of RAM, what it felt.

The log is the oracle's memory: the counter each page of this vCPU must show. It lies outside guest
RAM and travels here, so damage to RAM in transit cannot also damage what RAM is judged by.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from migration.wire.compat import Property
from migration.wire.vmstate import (
    U32,
    U64,
    Buffer,
    EqualInteger,
    Struct,
    StructArray,
    U32Equal,
    U64Equal,
    VBuffer,
    VMStateDescription,
)

from .._native import ffi, lib
from ..auxmem import AuxMemory
from ..histogram import BUCKET_BYTES, BUCKETS
from ..kvm import KvmVCpu
from ..vcpu import VCpu
from .cpu_kvm import KVM, KvmPart

LOG_BYTES_MAX = 64 << 20
_NO_BOOT_ID = bytes(16)


@functools.cache
def boot_id() -> bytes:
    """16 bytes that differ between hosts and boots: whether two CLOCK_MONOTONIC readings
    compare."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return _NO_BOOT_ID


class CpuDevice:
    """Reads and writes the vCPU's C state in place. Save and load only while the vCPU is parked.

    :ivar sends_clock: the last-operation times travel too (machine types from toy-1.1 on).
    """

    device_type = "toy-cpu"
    properties = {"x-clock": Property("sends_clock")}  # noqa: RUF012 - a constant of the class

    def __init__(self, vcpu: VCpu, aux: AuxMemory) -> None:
        self.vcpu = vcpu
        self.aux = aux
        self.state: Any = aux.state(vcpu.index)
        self.sends_clock = True
        self.index = vcpu.index
        self.smp = int(aux.layout.smp)
        self.seed = int(aux.layout.seed)
        self.log_bytes = aux.log_bytes(vcpu.index)
        self.bucket_count = BUCKETS
        self.last_op_ns = 0
        self.last_op_realtime_ns = 0
        self.boot_id = _NO_BOOT_ID
        self.kvm = KvmPart()

    @property
    def log(self) -> bytes:
        """Expected counters, little-endian u32, one for each page the vCPU owns."""
        return bytes(self.aux.log(self.index))

    @log.setter
    def log(self, data: bytes) -> None:
        self.aux.log(self.index)[:] = data

    @property
    def bad_touches(self) -> list[Any]:
        """The C structs of the damaged pages it touched first, loaded in place."""
        return list(self.state.bad)

    @bad_touches.setter
    def bad_touches(self, entries: list[Any]) -> None:
        """They are in place already."""

    @property
    def buckets(self) -> bytes:
        """Histogram counts, little-endian u32."""
        return bytes(ffi.buffer(self.state.latency.bucket))

    @buckets.setter
    def buckets(self, data: bytes) -> None:
        ffi.buffer(self.state.latency.bucket)[:] = data

    def downtime_ns(self, first_op_ns: int, first_op_realtime_ns: int) -> int | None:
        """From this vCPU's last operation at the source to the given moment here; by
        CLOCK_MONOTONIC when both ran on one kernel, else by CLOCK_REALTIME. None when it never came
        from anywhere."""
        if not self.last_op_ns:
            return None
        if self.boot_id == boot_id() != _NO_BOOT_ID:
            return first_op_ns - self.last_op_ns
        return first_op_realtime_ns - self.last_op_realtime_ns


def _pre_save(cpu: CpuDevice) -> None:
    cpu.last_op_ns = cpu.vcpu.last_op_ns
    cpu.last_op_realtime_ns = cpu.vcpu.last_op_realtime_ns
    cpu.boot_id = boot_id()


def _pre_load(cpu: CpuDevice) -> None:
    cpu.last_op_ns = cpu.last_op_realtime_ns = 0
    cpu.boot_id = _NO_BOOT_ID
    cpu.kvm.received = False


def _post_load(cpu: CpuDevice, version_id: int) -> None:
    slots = cpu.log_bytes // 4
    if cpu.state.position >= slots:
        position, cpu.state.position = int(cpu.state.position), 0
        raise ValueError(f"position {position} of {slots} pages")
    if cpu.state.bad_count > lib.TOY_MAX_BAD:
        cpu.state.bad_count = 0
        raise ValueError("more bad pages than are kept")
    cpu.state.phase = lib.PHASE_IDLE
    cpu.state.probe_clock = 0
    cpu.state.first_clock = 0
    if isinstance(cpu.vcpu, KvmVCpu):
        cpu.kvm.apply(cpu, cpu.vcpu)


def _same(element: EqualInteger, option: str) -> EqualInteger:
    return element.with_hint(f"{option} must be the same on both sides")


CLOCK = VMStateDescription(
    name="toy-cpu/clock",
    version_id=1,
    minimum_version_id=1,
    needed=lambda cpu: bool(cpu.sends_clock and cpu.vcpu.last_op_ns),
    fields=(U64("last_op_ns"), U64("last_op_realtime_ns"), Buffer("boot_id", 16)),
)

BAD_TOUCH = VMStateDescription(
    name="toy-cpu-bad-touch",
    version_id=1,
    minimum_version_id=1,
    fields=(U32("damage"), U32("block"), U64("page"), U64("expected"), U64("found")),
)

LATENCY = VMStateDescription(
    name="toy-cpu-latency",
    version_id=1,
    minimum_version_id=1,
    fields=(U64("count"), U64("sum_ns"), U64("max_ns")),
)

CPU = VMStateDescription(
    name="toy-cpu",
    version_id=1,
    minimum_version_id=1,
    pre_save=_pre_save,
    pre_load=_pre_load,
    post_load=_post_load,
    fields=(
        _same(U32Equal, "-smp")("smp"),
        _same(U64Equal, "the seed")("seed"),
        _same(U32Equal, "RAM, -smp and the working set")("log_bytes"),
        U64("rng", attr="state.rng"),
        U64("position", attr="state.position"),
        U64("ops", attr="state.ops"),
        U64("writes", attr="state.writes"),
        U64("hits", attr="state.hits"),
        U64("misses", attr="state.misses"),
        U64("errors", attr="state.errors"),
        U64("bad_count", attr="state.bad_count"),
        StructArray("bad", BAD_TOUCH, count=lib.TOY_MAX_BAD, attr="bad_touches"),
        Struct("latency", LATENCY, attr="state.latency"),
        U32Equal("bucket_count"),
        Buffer("buckets", BUCKET_BYTES),
        VBuffer("log", size="log_bytes", limit=LOG_BYTES_MAX),
    ),
    subsections=(CLOCK, KVM),
)
