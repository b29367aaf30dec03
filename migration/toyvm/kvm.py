"""vCPUs that are KVM's: the Python side of ``csrc/kvm.c`` and ``csrc/kvm_vcpu.c``."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from guestmem import Bitmap, KvmSlot, RAMBlock
from uffd.threads import NamedThread

from ._native import ffi, lib
from .auxmem import AuxMemory
from .vcpu import JOIN_TIMEOUT_S, VCpuStatistics, read_statistics, received_addresses


class KvmMachine:
    """A VM with a slot for each RAM block and its vCPUs, parked.

    :ivar vcpus: one :class:`KvmVCpu` each. :ivar slots: the RAM slots, for KVM's dirty log.
    """

    def __init__(
        self, aux: AuxMemory, blocks: Sequence[RAMBlock], *, ring_entries: int = 0
    ) -> None:
        """:param ring_entries: of each vCPU's dirty ring, a power of two; 0: a dirty log instead.

        :raises OSError: there is no usable KVM; the message says what was asked of it.
        """
        self._blocks = tuple(blocks)
        self._native: Any = ffi.new("struct kvm_vm *")
        self._shown: dict[int, tuple[tuple[int, int], int]] = {}
        self.vcpus: list[KvmVCpu] = []
        smp = int(aux.layout.smp)
        base = ffi.new("uint64_t[]", [block.host for block in blocks])
        pages = ffi.new("uint64_t[]", [block.page_count for block in blocks])
        _check(
            lib.kvm_vm_init(
                self._native, smp, len(blocks), base, pages, aux.address, aux.length, ring_entries
            ),
            "creating a KVM virtual machine"
            + (f" with dirty rings of {ring_entries} entries" if ring_entries else ""),
        )
        try:
            for index in range(smp):
                self.vcpus.append(KvmVCpu(self, index, aux, blocks))
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The VM's file descriptor, owned by this object."""
        return int(self._native.fd)

    @property
    def native(self) -> Any:
        """The ``struct kvm_vm``."""
        return self._native

    @property
    def rings(self) -> int:
        """Address of the VM's ``struct kvmring``, owned by this object; 0: it has none."""
        return int(ffi.cast("uintptr_t", lib.kvm_vm_ring(self._native)))

    @property
    def slots(self) -> tuple[KvmSlot, ...]:
        """The slots that show RAM blocks."""
        return tuple(
            KvmSlot(
                slot=lib.SLOT_RAM + number,
                idstr=block.idstr,
                offset=0,
                length=block.used_length,
                guest_address=int(self._native.ram_gpa[number]),
            )
            for number, block in enumerate(self._blocks)
        )

    @property
    def code_crc(self) -> int:
        """Of the guest's program: registers only mean something to the very same one."""
        code = ffi.cast("char *", lib.kvm_vm_code(self._native))
        return zlib.crc32(ffi.buffer(code, lib.kvm_vm_code_bytes()))

    def show_received(self, number: int, address: int, nbits: int) -> int:
        """Where the guest sees a bitmap of ours. Only while every vCPU is parked.

        A slot is only made when the bitmap is another one: taking a slot away makes KVM forget all
        its mappings of the whole guest.
        """
        length = -(-nbits // 64) * 8
        known, guest = self._shown.get(number, ((0, 0), 0))
        if known != (address, length):
            out = ffi.new("uint64_t *")
            _check(
                lib.kvm_vm_set_received(self._native, number, address, length, out),
                "showing a received bitmap to the guest",
            )
            guest = int(out[0])
            self._shown[number] = (address, length), guest
        return guest

    def close(self) -> None:
        """End the vCPUs, close the VM. Harmless the second time."""
        for vcpu in self.vcpus:
            vcpu.close()
        lib.kvm_vm_deinit(self._native)


class KvmVCpu:
    """A KVM vCPU and its thread, asleep at its gate until :meth:`go`."""

    def __init__(
        self, machine: KvmMachine, index: int, aux: AuxMemory, blocks: Sequence[RAMBlock]
    ) -> None:
        """:raises OSError: KVM refused."""
        self.index = index
        self.machine = machine
        self._blocks = tuple(blocks)
        self._state = aux.state(index)
        self._native: Any = ffi.new("struct kvm_vcpu *")
        view = aux.view(index, blocks)
        _check(
            lib.kvm_vcpu_init(self._native, machine.native, index, view, aux.address),
            f"creating KVM vCPU {index}",
        )
        self._thread = NamedThread(
            target=lib.kvm_vcpu_serve, args=(self._native,), name=f"kvm vcpu {index}", daemon=True
        )
        self._thread.start()

    @property
    def native(self) -> Any:
        """The ``struct kvm_vcpu``."""
        return self._native

    @property
    def thread_id(self) -> int:
        """Kernel id of the thread, as userfaultfd reports it and CPU affinity wants it."""
        return self._thread.native_id or 0

    @property
    def last_op_ns(self) -> int:
        """CLOCK_MONOTONIC of the last operation before the latest park."""
        return int(self._native.last_op_ns)

    @property
    def last_op_realtime_ns(self) -> int:
        """The same moment on CLOCK_REALTIME, for comparison across hosts."""
        return int(self._native.last_op_realtime_ns)

    def go(self) -> None:
        """Let it run. One futex wake."""
        lib.kvm_vcpu_go(self._native)

    def ask_halt(self) -> None:
        """Ask it to park and kick it out of KVM_RUN; does not wait."""
        lib.kvm_vcpu_ask_halt(self._native)

    def halt(self) -> None:
        """Returns when it is parked between two operations, or before one it could not begin."""
        lib.kvm_vcpu_halt(self._native)

    def forget_first_op(self) -> None:
        """The next operation is the first one. Only while parked."""
        self._state.first_clock = 0

    def set_received(self, received: Mapping[str, Bitmap]) -> None:
        """Bitmaps to look at before each touch. Only while every vCPU is parked."""
        addresses = received_addresses(self._blocks, received)
        for number, block in enumerate(self._blocks):
            address = int(addresses[number])
            guest = 0
            if address:
                nbits = received[block.idstr].nbits
                guest = self.machine.show_received(number, address, nbits)
            self._native.shared.view.received[number] = guest

    def statistics(self) -> VCpuStatistics:
        """A snapshot; may be taken while it runs."""
        return read_statistics(
            self.index,
            self._state,
            status=int(self._native.status),
            is_running=lib.kvm_vcpu_is_running(self._native),
            lost_address=int(self._native.lost_address),
            first_op_ns=lib.kvm_vcpu_tick_ns(self._native, int(self._state.first_clock)),
        )

    def save(self, out: Any) -> None:
        """All registers and the stack into a ``struct kvm_state``. Only while parked.

        :raises OSError: KVM refused.
        """
        _check(lib.kvm_state_save(self._native, out), f"reading the state of vCPU {self.index}")

    def restore(self, state: Any | None) -> None:
        """Put saved registers back, or, without any, start at the program's beginning.

        :raises OSError: KVM refused, or the registers are not those of our guest (``EINVAL``).
        """
        if state is None:
            result = lib.kvm_state_reset(self._native)
        else:
            result = lib.kvm_state_restore(self._native, state)
        _check(result, f"setting the state of vCPU {self.index}")

    def close(self) -> None:
        """End the thread and join it, close the vCPU. Harmless the second time."""
        if self._thread.is_alive():
            lib.kvm_vcpu_halt(self._native)
            lib.kvm_vcpu_quit(self._native)
            self._thread.join(JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                raise RuntimeError(f"KVM vCPU {self.index} does not end")
        lib.kvm_vcpu_deinit(self._native)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
