"""Messages as the kernel lays them out become typed events."""

from __future__ import annotations

import struct

from uffd import FaultFlag, Fork, PageFault, Remap, Remove, UnknownEvent, Unmap, Userfaultfd
from uffd.events import decode_message


def no_child(fd: int) -> Userfaultfd:
    raise AssertionError(f"fd {fd} is no fork")


def message(event: int, *words: int) -> bytes:
    return struct.pack("<B7x", event) + struct.pack(f"<{len(words)}Q", *words).ljust(24, b"\0")


def test_page_fault_flags() -> None:
    def fault(flags: int) -> PageFault:
        event = decode_message(
            message(0x12, flags, 0x7F0000001234, 4321), has_thread_id=True, adopt=no_child
        )
        assert isinstance(event, PageFault)
        return event

    missing = fault(0)
    assert (missing.address, missing.thread_id) == (0x7F0000001234, 4321)
    assert missing.is_missing
    assert not missing.is_write
    assert fault(1).is_write
    assert fault(1).is_missing
    assert fault(3).is_write_protect
    assert not fault(3).is_missing
    assert fault(5).is_minor
    assert fault(8).is_read_write_protect
    assert fault(1 << 20).flags == FaultFlag(1 << 20)


def test_thread_id_is_absent_without_its_feature() -> None:
    event = decode_message(message(0x12, 0, 4096, 0), has_thread_id=False, adopt=no_child)
    assert event == PageFault(4096, FaultFlag.NONE, None)


def test_layout_events() -> None:
    def decode(raw: bytes) -> object:
        return decode_message(raw, has_thread_id=False, adopt=no_child)

    assert decode(message(0x14, 1, 2, 3)) == Remap(1, 2, 3)
    assert decode(message(0x15, 4096, 8192)) == Remove(4096, 8192)
    assert decode(message(0x16, 4096, 12288)) == Unmap(4096, 12288)
    assert Unmap(4096, 12288).length == 8192
    assert decode(message(0x77, 5, 6, 7)) == UnknownEvent(0x77, struct.pack("<3Q", 5, 6, 7))


def test_fork_hands_its_fd_to_the_adopter() -> None:
    adopted: list[int] = []

    def adopt(fd: int) -> Userfaultfd:
        adopted.append(fd)
        return Userfaultfd.__new__(Userfaultfd)

    event = decode_message(message(0x13, 17), has_thread_id=False, adopt=adopt)
    assert isinstance(event, Fork)
    assert adopted == [17]
