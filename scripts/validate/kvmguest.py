"""The smallest KVM guest that reads memory in user mode: one vCPU, one byte per run.

Long mode at privilege level 3, because some nested KVMs run only that natively and emulate the
rest, where faults behave differently. The byte read comes out as a store to a place without memory.
Layout of guest-physical memory, in 2 MiB pages: 0 page tables and code, 1 the memory under test,
2 nothing (the doorbell).
"""

import fcntl
import mmap
import os
import signal
import struct

from scripts.validate import raw
from scripts.validate.check import Skipped
from scripts.validate.kinds import HUGE, PAGE
from uffd import Mapping

_CREATE_VM, _GET_VCPU_MMAP_SIZE, _GET_SUPPORTED_CPUID = 0xAE01, 0xAE04, 0xC008AE05
_SET_TSS_ADDR, _SET_MEMORY, _CREATE_VCPU = 0xAE47, 0x4020AE46, 0xAE41
_CREATE_GUEST_MEMFD = 0xC040AED4
_RUN, _SET_REGS, _GET_SREGS, _SET_SREGS = 0xAE80, 0x4090AE82, 0x8138AE83, 0x4138AE84
_SET_CPUID2, _SET_SIGNAL_MASK = 0x4008AE90, 0x4004AE8B
_SREGS, _CPUID_ENTRIES = 312, 128
EXIT_MMIO, EXIT_INTR = 6, 10

_CODE_AT, _PML4, _PDPT, _PD = 0, PAGE, 2 * PAGE, 3 * PAGE
_RAM_AT, _BELL_AT, _TSS_AT = HUGE, 2 * HUGE, 0xFFFBD000
# mov (%rdi),%al; mov %al,(%rsi); jmp .
_CODE = bytes([0x8A, 0x07, 0x88, 0x06, 0xEB, 0xFE])
_PRESENT_WRITABLE_USER, _LARGE = 7, 0x80


class Guest:
    """One VM over ``ram``. :raises Skipped: no KVM here."""

    def __init__(self, ram: Mapping) -> None:
        if not os.path.exists("/dev/kvm"):
            raise Skipped("no /dev/kvm")
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            raise Skipped("/dev/kvm is not ours to open", "run as root")
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.vm = fcntl.ioctl(self.kvm, _CREATE_VM, 0)
        except OSError as error:
            raise Skipped(f"KVM makes no VM: {error}") from None
        assert raw.ioctl(self.vm, _SET_TSS_ADDR, _TSS_AT) == 0  # fcntl takes only int32
        self._low = Mapping.anonymous(8 * PAGE)
        self._fill()
        self._slot(0, 0, self._low)
        self._slot(1, _RAM_AT, ram)
        self.vcpu = fcntl.ioctl(self.vm, _CREATE_VCPU, 0)
        self.run_page = mmap.mmap(self.vcpu, fcntl.ioctl(self.kvm, _GET_VCPU_MMAP_SIZE, 0))
        self._enter_long_mode()

    def _fill(self) -> None:
        self._low.write(_CODE_AT, _CODE)
        self._low.write(_PML4, struct.pack("<Q", _PDPT | _PRESENT_WRITABLE_USER))
        self._low.write(_PDPT, struct.pack("<Q", _PD | _PRESENT_WRITABLE_USER))
        large = _PRESENT_WRITABLE_USER | _LARGE
        self._low.write(_PD, struct.pack("<3Q", *(i * HUGE | large for i in range(3))))

    def _slot(self, number: int, at: int, memory: Mapping) -> None:
        words = struct.pack("<IIQQQ", number, 0, at, memory.length, memory.address)
        fcntl.ioctl(self.vm, _SET_MEMORY, words)

    def _enter_long_mode(self) -> None:
        cpuid = bytearray(8 + 40 * _CPUID_ENTRIES)
        struct.pack_into("<I", cpuid, 0, _CPUID_ENTRIES)
        assert raw.ioctl(self.kvm, _GET_SUPPORTED_CPUID, cpuid) == 0
        assert raw.ioctl(self.vcpu, _SET_CPUID2, cpuid) == 0
        sregs = bytearray(_SREGS)
        fcntl.ioctl(self.vcpu, _GET_SREGS, sregs)
        code = struct.pack("<QIHBBBBBBBB2x", 0, 0xFFFFFFFF, 0x33, 11, 1, 3, 0, 1, 1, 1, 0)
        data = struct.pack("<QIHBBBBBBBB2x", 0, 0xFFFFFFFF, 0x2B, 3, 1, 3, 1, 1, 0, 1, 0)
        sregs[0:24] = code
        for segment in range(1, 6):
            sregs[24 * segment : 24 * (segment + 1)] = data
        struct.pack_into("<QQQQ", sregs, 224, 0x80050033, 0, _PML4, 0x20)
        struct.pack_into("<Q", sregs, 264, 0x500)
        fcntl.ioctl(self.vcpu, _SET_SREGS, bytes(sregs))

    def read(self, offset: int) -> tuple[int, int | None]:
        """Let the guest load one byte of the RAM: the result of KVM_RUN (0 or minus the error),
        and the byte if it got that far. Sleeps without the interpreter lock.
        """
        registers = [0] * 18  # rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags
        registers[4], registers[5] = _BELL_AT, _RAM_AT + offset
        registers[16], registers[17] = _CODE_AT, 0x3002
        fcntl.ioctl(self.vcpu, _SET_REGS, struct.pack("<18Q", *registers))
        return self.resume()

    def resume(self) -> tuple[int, int | None]:
        """KVM_RUN from where the vCPU is."""
        result = raw.ioctl(self.vcpu, _RUN)
        if result == 0 and self.exit_reason == EXIT_MMIO:
            return 0, self.run_page[40]
        return result, None

    @property
    def exit_reason(self) -> int:
        (reason,) = struct.unpack_from("<I", self.run_page, 8)
        return int(reason)

    def unblock_while_running(self, number: int) -> None:
        """Only while the guest runs may this signal interrupt; it then stays pending outside."""
        mask = ((1 << 64) - 1) & ~(1 << (number - 1))
        argument = bytearray(struct.pack("<IQ", 8, mask))
        assert raw.ioctl(self.vcpu, _SET_SIGNAL_MASK, argument) == 0

    def guest_memfd(self, length: int) -> int:
        """An fd of guest_memfd memory that may be mapped, or minus the error."""
        argument = bytearray(64)
        struct.pack_into("<QQ", argument, 0, length, 3)
        return raw.ioctl(self.vm, _CREATE_GUEST_MEMFD, argument)


def wait_signal(number: int, timeout_s: float) -> signal.struct_siginfo | None:
    """The pending signal of this thread (blocked there), if it comes."""
    return signal.sigtimedwait([number], timeout_s)
