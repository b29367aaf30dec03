"""The smallest KVM guest that writes memory: one vCPU in real mode, one store per request."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

from guestmem import KvmSlot, RAMBlock
from guestmem._native import ffi, lib
from tests.support.need import need

_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_SET_TSS_ADDR = 0xAE47
_SET_MEMORY = 0x4020AE46
_RUN = 0xAE80
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SREGS_BYTES = 312
_EXIT_HLT = 5
_EXIT_DIRTY_RING_FULL = 31
# mov %al, (%di); hlt
_CODE = bytes([0x88, 0x05, 0xF4])
CODE_SLOT = 7
RAM_SLOT = 0
# Real mode reaches 64 KiB above a segment's base; the base itself may be anywhere.
_CODE_ADDRESS = 1 << 20


class KvmGuest:
    """A VM whose RAM slots show blocks, and a vCPU that stores bytes when told."""

    def __init__(self, code: RAMBlock, ring_entries: int = 0) -> None:
        need(os.path.exists("/dev/kvm"), "no /dev/kvm")
        need(os.access("/dev/kvm", os.R_OK | os.W_OK), "/dev/kvm is not ours", remedy="run as root")
        self.ring_full_exits = 0
        self._fds = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)]
        kvm = self._fds[0]
        assert fcntl.ioctl(kvm, _GET_API_VERSION, 0) == 12
        self.vm_fd = fcntl.ioctl(kvm, _CREATE_VM, 0)
        self._fds.append(self.vm_fd)
        self._ring = ffi.new("struct kvmring *") if ring_entries else None
        if self._ring is not None:
            need(lib.kvmring_most_entries(self.vm_fd) >= ring_entries, "this KVM has no dirty ring")
            assert lib.kvmring_enable(self.vm_fd, ring_entries) == 0
            assert lib.kvmring_init(self._ring, self.vm_fd, ring_entries, 1) == 0
        fcntl.ioctl(self.vm_fd, _SET_TSS_ADDR, 0x7FFBD000)
        code.write(0, _CODE)
        self.add_slot(KvmSlot(CODE_SLOT, code.idstr, 0, code.used_length, _CODE_ADDRESS), code)
        self._vcpu = fcntl.ioctl(self.vm_fd, _CREATE_VCPU, 0)
        self._fds.append(self._vcpu)
        if self._ring is not None:
            assert lib.kvmring_add_vcpu(self._ring, self._vcpu) == 0
        self._run = mmap.mmap(self._vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))

    @property
    def rings(self) -> int:
        """Address of the VM's dirty rings, 0 without."""
        return 0 if self._ring is None else int(ffi.cast("uintptr_t", self._ring))

    def add_slot(self, slot: KvmSlot, block: RAMBlock) -> None:
        """Show part of a block to the guest, without dirty logging."""
        host = block.host + slot.offset
        fcntl.ioctl(
            self.vm_fd,
            _SET_MEMORY,
            struct.pack("<IIQQQ", slot.slot, slot.flags, slot.guest_address, slot.length, host),
        )

    def store(self, guest_address: int, byte: int) -> None:
        """Let the vCPU store one byte, and halt."""
        sregs = bytearray(_SREGS_BYTES)
        fcntl.ioctl(self._vcpu, _GET_SREGS, sregs)
        # Each segment is 24 bytes and begins with its base; the order is cs, ds, ...
        struct.pack_into("<Q", sregs, 0, _CODE_ADDRESS)
        struct.pack_into("<Q", sregs, 24, guest_address)
        fcntl.ioctl(self._vcpu, _SET_SREGS, bytes(sregs))
        registers = [0] * 18  # rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags
        registers[0], registers[17] = byte, 2
        fcntl.ioctl(self._vcpu, _SET_REGS, struct.pack("<18Q", *registers))
        reason = self._enter()
        while reason == _EXIT_DIRTY_RING_FULL:
            self.ring_full_exits += 1
            assert lib.kvmring_full(self._ring) > 0
            reason = self._enter()
        assert reason == _EXIT_HLT, f"KVM_RUN ended with exit reason {reason}"

    def _enter(self) -> int:
        fcntl.ioctl(self._vcpu, _RUN, 0)
        (reason,) = struct.unpack_from("<I", self._run, 8)
        return int(reason)

    def close(self) -> None:
        if self._ring is not None:
            lib.kvmring_deinit(self._ring)
        self._run.close()
        for fd in reversed(self._fds):
            os.close(fd)


@contextlib.contextmanager
def kvm_guest(ring_entries: int = 0) -> Iterator[KvmGuest]:
    """A guest with its code in place and no RAM yet, with a dirty ring or a dirty log."""
    with RAMBlock.allocate("code", mmap.PAGESIZE) as code:
        guest = KvmGuest(code, ring_entries)
        try:
            yield guest
        finally:
            guest.close()
