"""A KVM vCPU's registers on the wire: subsection ``toy-cpu/kvm``.

The kernel's own layouts (little-endian, ``linux/kvm.h``) travel as they are. A destination whose
vCPUs are threads reads and drops them: a vCPU never leaves in the middle of an operation that has
touched its page, so the workload's own state is enough to go on with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from migration.wire.vmstate import (
    U8,
    U32,
    U64,
    Bool,
    Buffer,
    Pointer,
    StructArray,
    Validate,
    VMStateDescription,
)

from .._native import ffi, lib
from ..kvm import KvmVCpu

if TYPE_CHECKING:
    from .cpu import CpuDevice

_GROUPS = ("regs", "sregs", "debugregs", "xcrs", "events", "xsave", "stack")


def _group_bytes(name: str) -> int:
    state = ffi.new("struct kvm_state *")
    return int(ffi.sizeof(getattr(state, name)))


class Registers:
    """A ``struct kvm_state`` with its groups as bytes, under their names."""

    def __init__(self) -> None:
        self.native: Any = ffi.new("struct kvm_state *")

    def __getattr__(self, name: str) -> Any:
        if name in _GROUPS:
            return bytes(ffi.buffer(ffi.addressof(self.native, name)))
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GROUPS:
            ffi.buffer(ffi.addressof(self.native, name))[:] = value
        else:
            super().__setattr__(name, value)

    @property
    def msrs(self) -> list[Any]:
        """The C structs, loaded in place."""
        return list(self.native.msrs)

    @msrs.setter
    def msrs(self, entries: list[Any]) -> None:
        """They are in place already."""


class KvmPart:
    """What a cpu device keeps for the subsection.

    :ivar received: registers came in with the latest load.
    """

    def __init__(self) -> None:
        self.registers = Registers()
        self.code_crc = 0
        self.phase = 0
        self.is_probing = False
        self.received = False

    def collect(self, cpu: CpuDevice, vcpu: KvmVCpu) -> None:
        """Before a save."""
        vcpu.save(self.registers.native)
        self.code_crc = vcpu.machine.code_crc
        self.phase = int(cpu.state.phase)
        self.is_probing = bool(cpu.state.probe_clock)

    def apply(self, cpu: CpuDevice, vcpu: KvmVCpu) -> None:
        """After a load. Registers of another program mean nothing: then the workload's state alone
        says where to go on.

        :raises OSError: KVM refused, or they are not a guest's of ours.
        """
        is_same_program = self.received and self.code_crc == vcpu.machine.code_crc
        vcpu.restore(self.registers.native if is_same_program else None)
        cpu.state.phase = self.phase if is_same_program else lib.PHASE_IDLE
        # Any value: the clock of a probe in flight starts anew when the vCPU does.
        cpu.state.probe_clock = int(is_same_program and self.is_probing)


def _pre_save(cpu: CpuDevice) -> None:
    assert isinstance(cpu.vcpu, KvmVCpu)
    cpu.kvm.collect(cpu, cpu.vcpu)


def _post_load(cpu: CpuDevice, version_id: int) -> None:
    cpu.kvm.received = True


MSR = VMStateDescription(
    name="toy-cpu-msr",
    version_id=1,
    minimum_version_id=1,
    fields=(U64("index"), U64("value")),
)

REGISTERS = VMStateDescription(
    name="toy-cpu-registers",
    version_id=1,
    minimum_version_id=1,
    fields=(
        *(Buffer(name, _group_bytes(name)) for name in _GROUPS),
        U64("mp_state", attr="native.mp_state"),
        U64("msr_count", attr="native.msr_count"),
        StructArray("msrs", MSR, count=lib.KVM_STATE_MSRS),
    ),
)

KVM = VMStateDescription(
    name="toy-cpu/kvm",
    version_id=1,
    minimum_version_id=1,
    needed=lambda cpu: isinstance(cpu.vcpu, KvmVCpu),
    pre_save=_pre_save,
    post_load=_post_load,
    fields=(
        U32("code_crc", attr="kvm.code_crc"),
        U8("phase", attr="kvm.phase"),
        Validate("not within an operation", lambda cpu, _: cpu.kvm.phase < lib.PHASE_MODIFY),
        Bool("is_probing", attr="kvm.is_probing"),
        Pointer("registers", REGISTERS, attr="kvm.registers"),
    ),
)
