"""KVM: there, fast, and with its guests' faults reported. Tried with a guest of three instructions.

x86-64 only. The guest runs at CPL 3 (like a guest's user programs) and at CPL 0 (like a guest's
kernel), because some nested hypervisors run the one natively and emulate the other.
"""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from typing import Any

from uffd import Mapping, Userfaultfd

from .. import facts, reasons
from .._native import ffi, lib
from ..attempt import (
    MARK,
    Answer,
    Sleeper,
    base_page,
    expect,
    next_fault,
    open_context,
    page_bytes,
)
from ..row import Cause, Check, Outcome, Tier, no, untested, yes

_GROUP = "kvm"
_DEVICE = "/dev/kvm"
_KERNEL, _USER = 0, 3
_WHO = {_KERNEL: "kernel", _USER: "user"}
_PAGES = 16
_RING_BYTES = 64 << 10
_SPIN = 5_000
_ROUNDS = 3
#: A processor needs less than one, an emulator several hundred.
_EMULATED_NS = 50.0
_KICK_PATIENCE_S = 0.3


class Guest:
    """A VM with one vCPU and :data:`_PAGES` pages of RAM."""

    def __init__(self, *, ring_bytes: int = 0) -> None:
        """:raises Answer: it cannot be had; the row then says why."""
        self.ram = Mapping.anonymous(_PAGES * base_page())
        self._native: Any = ffi.new("struct guest *")
        step = ffi.new("uint32_t *")
        result = lib.guest_init(self._native, self.ram.address, self.ram.length, ring_bytes, step)
        if result < 0 and step[0] == lib.GUEST_STEP_OPEN and result != -errno.EOPNOTSUPP:
            raise Answer(
                untested(Cause.PREREQUISITE, "no /dev/kvm for us", "postcopy probe --feature kvm")
            )
        if result < 0:
            raise Answer(_why_no_guest(-result, step[0]))

    def run(self, program: int, cpl: int, argument: int) -> Any:
        """The answer of one program. Sleeps without the interpreter lock while a page is missing.

        :raises InterruptedError: a signal came first. :raises Answer: the guest went astray.
        """
        answer = ffi.new("struct guest_answer *")
        result = lib.guest_run(self._native, program, cpl, argument, answer)
        if result == -errno.EINTR:
            raise InterruptedError
        if result < 0:
            why = f"KVM_RUN: {os.strerror(-result)}, exit reason {answer.exit_reason}"
            raise Answer(no(Cause.UNEXPECTED, f"{why}, in guest {_WHO[cpl]} code"))
        return answer

    def dirty_pages(self) -> list[int]:
        """Pages written since the last call, by KVM's account."""
        pages = ffi.new("uint64_t[]", _PAGES)
        count = lib.guest_dirty_pages(self._native, pages, _PAGES)
        if count < 0:
            raise Answer(no(Cause.KERNEL, f"reading dirty pages: {os.strerror(-count)}"))
        return [int(pages[i]) for i in range(count)]


def _why_no_guest(code: int, step: int) -> Outcome:
    if code == errno.EOPNOTSUPP and step == lib.GUEST_STEP_RING:
        return no(Cause.KERNEL, "KVM has no dirty ring", "Linux 5.11 or newer, on x86")
    if code == errno.EOPNOTSUPP:
        return untested(Cause.HARDWARE, f"this check knows x86-64, not {os.uname().machine}")
    what = {
        lib.GUEST_STEP_VM: "KVM_CREATE_VM",
        lib.GUEST_STEP_RING: "enabling the dirty ring",
        lib.GUEST_STEP_MEMORY: "KVM_SET_USER_MEMORY_REGION",
        lib.GUEST_STEP_VCPU: "setting up a vCPU",
    }[step]
    return no(Cause.KERNEL, f"{what}: {os.strerror(code)}")


def _why_not_open(code: int) -> Outcome:
    if code in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return _why_no_device()
    if code == errno.EACCES:
        return no(Cause.PERMISSION, reasons.mode_of(_DEVICE), reasons.open_file_to_user(_DEVICE))
    if code == errno.EPERM:
        return no(Cause.RESTRICTION, "a device policy forbids it", f"docker run --device {_DEVICE}")
    return no(Cause.KERNEL, f"{_DEVICE}: {os.strerror(code)}")


def _why_no_device() -> Outcome:
    if facts.misc_minor("kvm") is not None:
        return reasons.no_device_node("kvm", _DEVICE, None)
    flags = set(facts.cpu_field("flags").split())
    if flags & {"vmx", "svm"}:
        module = "kvm_intel" if "vmx" in flags else "kvm_amd"
        return no(Cause.SETTING, f"no {_DEVICE}, though the processor could", f"modprobe {module}")
    return no(
        Cause.HARDWARE,
        f"no {_DEVICE}, and the processor shows neither VMX nor SVM",
        "switch virtualisation on in the firmware, or nesting in the hypervisor around this one",
    )


def device() -> Outcome:
    """Open it and ask for its version."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return _why_not_open(error.errno or errno.EIO)
    return yes("open to this user")


def runs() -> Outcome:
    """A guest loads from its memory, and we see what it saw."""
    guest = Guest()
    guest.ram.store(0, MARK)
    for cpl in (_USER, _KERNEL):
        seen = guest.run(lib.GUEST_LOAD, cpl, 0).value
        expect(seen == MARK, f"the guest read {seen:#x} at CPL {cpl}")
    return yes("its user and its kernel code")


def native(cpl: int) -> Outcome:
    """Count down from a large and from a small number: what an instruction costs."""
    guest = Guest()
    longest = min(guest.run(lib.GUEST_SPIN, cpl, _SPIN).ns for _ in range(_ROUNDS))
    shortest = min(guest.run(lib.GUEST_SPIN, cpl, 1).ns for _ in range(_ROUNDS))
    each = max(0, longest - shortest) / ((_SPIN - 1) * lib.GUEST_SPIN_INSTRUCTIONS)
    exit_us = shortest / 1000
    if each < _EMULATED_NS:
        return yes(f"{each:.1f} ns an instruction, an exit {exit_us:.0f} us")
    return no(
        Cause.HARDWARE,
        f"emulated, {each:.0f} ns an instruction: stock guests crawl",
        "a host with hardware virtualisation, or QEMU with -accel tcg",
        detail=f"an exit {exit_us:.0f} us",
    )


def _registered(guest: Guest) -> Userfaultfd:
    uffd = open_context(kernel_faults=True)
    uffd.register(guest.ram)
    return uffd


def fault(cpl: int) -> Outcome:
    """The guest touches a missing page; KVM_RUN sleeps until it is placed; the guest reads it."""
    guest = Guest()
    uffd = _registered(guest)
    page = guest.ram.page(3)
    vcpu = Sleeper(lambda: guest.run(lib.GUEST_LOAD, cpl, page - guest.ram.address))
    next_fault(uffd, page)
    uffd.copy(page, page_bytes(base_page()))
    seen = vcpu.result().value
    expect(seen == int.from_bytes(bytes([MARK]) * 8, "little"), f"the guest read {seen:#x}")
    return yes("KVM_RUN waits for the page")


def kick(cpl: int) -> Outcome:
    """A signal gets the vCPU out of a fault, so that stop and quit need not wait for a page."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    guest = Guest()
    uffd = _registered(guest)
    vcpu = Sleeper(lambda: guest.run(lib.GUEST_LOAD, cpl, 0))
    next_fault(uffd, guest.ram.address)
    signal.pthread_kill(vcpu.thread.ident or 0, signal.SIGUSR1)
    if not vcpu.ends_within(_KICK_PATIENCE_S):
        return no(
            Cause.HARDWARE,
            "it sleeps through signals until its page comes",
            "stop such a guest before its source is gone, or kill the process",
        )
    try:
        vcpu.result()
    except InterruptedError:
        return yes("KVM_RUN comes back with EINTR")
    return no(Cause.UNEXPECTED, "the guest read a page that was never placed")


def dirty(ring_bytes: int) -> Outcome:
    """The guest writes one page, and KVM's account names it."""
    guest = Guest(ring_bytes=ring_bytes)
    guest.dirty_pages()
    for cpl, page in ((_USER, 5), (_KERNEL, 9)):
        guest.run(lib.GUEST_STORE, cpl, page * base_page())
        expect(guest.ram.load(page * base_page()) != 0, "the guest's write is not in memory")
        found = guest.dirty_pages()
        expect(page in found, f"page {page} was written at CPL {cpl}, told were {found}")
    return yes("the written pages are told")


def checks() -> list[Check]:
    """The rows about KVM."""
    tier = Tier.KVM
    return [
        Check("kvm", "/dev/kvm", tier, _GROUP, device),
        Check("kvm-run", "a guest runs", tier, _GROUP, runs, aliases=("kvm-works",)),
        Check(
            "kvm-fault",
            "faults of guest user code",
            tier,
            _GROUP,
            partial(fault, _USER),
        ),
        Check("kvm-fault-kernel", "faults of guest kernels", tier, _GROUP, partial(fault, _KERNEL)),
        Check("kvm-kick", "signals end a wait of user code", tier, _GROUP, partial(kick, _USER)),
        Check(
            "kvm-kick-kernel",
            "signals end a wait of guest kernels",
            tier,
            _GROUP,
            partial(kick, _KERNEL),
        ),
        Check("kvm-native", "guest user code runs natively", tier, _GROUP, partial(native, _USER)),
        Check(
            "kvm-native-kernel",
            "guest kernels run natively",
            tier,
            _GROUP,
            partial(native, _KERNEL),
        ),
        Check("kvm-dirty-log", "dirty log", tier, _GROUP, partial(dirty, 0)),
        Check("kvm-dirty-ring", "dirty ring", tier, _GROUP, partial(dirty, _RING_BYTES), "5.11"),
    ]
