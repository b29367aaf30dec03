"""A KVM vCPU's pre_save fetches, and its post_load sets, the whole state: register by register.

Before the move every register that can hold a value of its own is given one, so that a register
which is not carried, or lands in another's place, shows.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import pytest

from migration.toyvm import ToyMachine, ToyOptions, VCpuKind
from migration.toyvm.devices.cpu_kvm import Registers
from migration.toyvm.kvm import KvmVCpu
from tests.support.toyvm_kvm import need_kvm
from tests.support.toyvm_machines import copy_ram, load_devices, run_some, save_devices

pytestmark = pytest.mark.kernel


class Register(NamedTuple):
    """One register in the kernel's layouts (``linux/kvm.h``, x86)."""

    name: str
    group: str
    offset: int
    length: int


def _row(group: str, names: str, start: int, length: int) -> list[Register]:
    """Registers of one length, one after the other."""
    each = names.split()
    return [Register(n, group, start + i * length, length) for i, n in enumerate(each)]


_SEGMENT = struct.Struct("<QIHBBBBBBBB")
_SEGMENT_PARTS = ["base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl"]


def _segments(names: str) -> list[Register]:
    found = []
    for number, name in enumerate(names.split()):
        at = number * 24
        for part, code in zip(_SEGMENT_PARTS, _SEGMENT.format[1:], strict=True):
            length = struct.calcsize(f"<{code}")
            found.append(Register(f"{name}.{part}", "sregs", at, length))
            at += length
    return found


GENERAL = _row(
    "regs", "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags", 0, 8
)
SYSTEM = [
    *_segments("cs ds es fs gs ss tr ldt"),
    Register("gdt.base", "sregs", 192, 8),
    Register("gdt.limit", "sregs", 200, 2),
    Register("idt.base", "sregs", 208, 8),
    Register("idt.limit", "sregs", 216, 2),
    *_row("sregs", "cr0 cr2 cr3 cr4 cr8 efer apic_base", 224, 8),
    *_row("sregs", "pending0 pending1 pending2 pending3", 280, 8),
]
DEBUG = _row("debugregs", "db0 db1 db2 db3 dr6 dr7", 0, 8)
CONTROL = [Register("nr_xcrs", "xcrs", 0, 4), Register("xcr0", "xcrs", 16, 8)]
VECTOR = [
    *_row("xsave", "fcw fsw", 0, 2),
    Register("mxcsr", "xsave", 24, 4),
    *_row("xsave", " ".join(f"st{n}" for n in range(8)), 32, 16),
    *_row("xsave", " ".join(f"xmm{n}" for n in range(16)), 160, 16),
    Register("xstate_bv", "xsave", 512, 8),
    *_row("xsave", " ".join(f"ymm{n}h" for n in range(16)), 576, 16),
]
EVENTS = [
    *_row("events", "exception.injected exception.nr exception.has_error_code", 0, 1),
    Register("exception.error_code", "events", 4, 4),
    *_row("events", "interrupt.injected interrupt.nr interrupt.soft interrupt.shadow", 8, 1),
    *_row("events", "nmi.injected nmi.pending nmi.masked", 12, 1),
    Register("sipi_vector", "events", 16, 4),
    *_row("events", "smm.smm smm.pending smm.inside_nmi smm.latched_init", 24, 1),
]
ALL = [*GENERAL, *SYSTEM, *DEBUG, *CONTROL, *VECTOR, *EVENTS]

_KERNEL_ADDRESS = 0xFFFF_8000_0000_0000
_MSR_VALUES = {
    0x175: _KERNEL_ADDRESS + 0x1750,  # SYSENTER_ESP
    0x176: _KERNEL_ADDRESS + 0x1760,  # SYSENTER_EIP
    0x277: 0x0007_0406_0007_0406,  # PAT
    0xC000_0082: _KERNEL_ADDRESS + 0x8200,  # LSTAR
    0xC000_0083: _KERNEL_ADDRESS + 0x8300,  # CSTAR
    0xC000_0084: 0x4_7700,  # SFMASK
    0xC000_0102: _KERNEL_ADDRESS + 0x10200,  # KERNEL_GS_BASE
}


def _value(state: Registers, register: Register) -> int:
    data: bytes = getattr(state, register.group)
    return int.from_bytes(data[register.offset : register.offset + register.length], "little")


def _put(state: Registers, name: str, value: int) -> None:
    register = next(each for each in ALL if each.name == name)
    data = bytearray(getattr(state, register.group))
    data[register.offset : register.offset + register.length] = value.to_bytes(
        register.length, "little"
    )
    setattr(state, register.group, bytes(data))


def _fetched(vcpu: KvmVCpu) -> Registers:
    state = Registers()
    vcpu.save(state.native)
    return state


def _msrs(state: Registers) -> dict[int, int]:
    count = int(state.native.msr_count)
    return {int(each.index): int(each.value) for each in state.msrs[:count]}


def _make_distinct(vcpu: KvmVCpu) -> dict[str, int]:
    """Give every register that user mode or its kernel may set a value of its own; the rest keeps
    what the guest has. Returns the values by name.
    """
    state = _fetched(vcpu)
    values = {name: 0x1111_0000_0000 * (n + 1) + n for n, name in enumerate(["rax", "rbx", "rcx"])}
    names = ["rdx", "rsi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"]
    values |= {name: 0x0123_4500_0000 * (n + 1) + n for n, name in enumerate(names)}
    values |= {f"db{n}": 0x40_0000 * (n + 1) for n in range(4)}
    values |= {f"xmm{n}": (n + 1) << 120 | 0xABCD << 40 | n for n in range(16)}
    values |= {f"st{n}": 0x3FFF_8000_0000_0000_0000 + n for n in range(8)}
    values |= {"mxcsr": 0x1FA0, "fcw": 0x27F, "cr2": 0x1234_5000}
    values |= {"fs.base": 0x7F00_1000, "gs.base": 0x7F00_2000}
    for name in [each for each in values if each.startswith(("r", "xmm", "db"))]:
        values[name] += vcpu.index << 12  # and another one on each vCPU
    for name, value in values.items():
        _put(state, name, value)
    _put(state, "xstate_bv", _value(state, _named("xstate_bv")) | 3)
    for each in state.msrs[: int(state.native.msr_count)]:
        wanted = _MSR_VALUES | {0xC000_0100: values["fs.base"], 0xC000_0101: values["gs.base"]}
        each.value = wanted.get(int(each.index), int(each.value))
    vcpu.restore(state.native)
    return values


def _named(name: str) -> Register:
    return next(each for each in ALL if each.name == name)


def test_no_register_is_listed_twice_or_overlaps() -> None:
    """The table itself: each group's registers lie one behind the other."""
    assert len({each.name for each in ALL}) == len(ALL)
    for group in {each.group for each in ALL}:
        spans = sorted((each.offset, each.length) for each in ALL if each.group == group)
        ends = [start + length for start, length in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))


@pytest.mark.parametrize("smp", [1, 3])
def test_every_register_arrives(smp: int) -> None:
    """Fetched before the save, set after the load; each vCPU has its own."""
    need_kvm()
    common: dict[str, Any] = {"ram_bytes": 2 << 20, "smp": smp, "vcpu": VCpuKind.KVM}
    one, two = ToyOptions(**common), ToyOptions(incoming=True, **common)
    with ToyMachine(one) as source, ToyMachine(two) as destination:
        run_some(source, 100)
        for vcpu in source.vcpus:
            assert isinstance(vcpu, KvmVCpu)
            values = _make_distinct(vcpu)
            here = _fetched(vcpu)
            for name, value in values.items():
                assert _value(here, _named(name)) == value, f"this KVM does not keep {name}"
        copy_ram(source, destination)
        load_devices(destination, save_devices(source))
        for vcpu, other in zip(source.vcpus, destination.vcpus, strict=True):
            assert isinstance(vcpu, KvmVCpu)
            assert isinstance(other, KvmVCpu)
            _assert_equal(_fetched(vcpu), _fetched(other))


def _assert_equal(sent: Registers, arrived: Registers) -> None:
    wrong = [
        f"{each.name}: {_value(sent, each):#x} became {_value(arrived, each):#x}"
        for each in ALL
        if _value(sent, each) != _value(arrived, each)
    ]
    assert not wrong
    assert _msrs(sent) == _msrs(arrived)
    assert len(_msrs(sent)) >= 10
    assert int(sent.native.mp_state) == int(arrived.native.mp_state)
    assert sent.xsave == arrived.xsave
    assert sent.stack == arrived.stack


@pytest.mark.parametrize("name", ["r13", "xmm7", "db2", "fs.base", "cr2", "mxcsr"])
def test_a_register_that_is_not_carried_shows(name: str) -> None:
    """The comparison can fail: one register altered behind its back is found by its name."""
    need_kvm()
    options = ToyOptions(ram_bytes=2 << 20, smp=1, vcpu=VCpuKind.KVM)
    with ToyMachine(options) as machine:
        vcpu = machine.vcpus[0]
        assert isinstance(vcpu, KvmVCpu)
        _make_distinct(vcpu)
        sent, arrived = _fetched(vcpu), _fetched(vcpu)
        _put(arrived, name, _value(arrived, _named(name)) ^ 4)
        with pytest.raises(AssertionError, match=name):
            _assert_equal(sent, arrived)
