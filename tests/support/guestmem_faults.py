"""A userfaultfd that watches a block for missing pages, straight on the kernel interface."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from guestmem import RAMBlock
from tests.support.need import need
from uffd._native import ffi, lib

_REGISTER_MISSING = 1
_PAGEFAULT = 0x12
_TIMEOUT_MS = 20_000


class MissingWatch:
    """Reports touches of missing pages of one block, and places pages."""

    def __init__(self, block: RAMBlock, *, features: int = 0) -> None:
        fd = lib.uffd_open_syscall(os.O_CLOEXEC | os.O_NONBLOCK)
        need(fd != -errno.EPERM, "userfaultfd is not permitted", remedy="run the tests as root")
        need(fd >= 0, f"no userfaultfd: {os.strerror(-fd)}")
        self.fd: int = fd
        self._block = block
        out: Any = ffi.new("uint64_t[2]")
        assert lib.uffd_api(fd, features, out, out + 1) == 0
        for mapping in block.mappings:
            result = lib.uffd_register(
                fd, mapping.host, block.placed_length, _REGISTER_MISSING, out
            )
            assert result == 0, os.strerror(-result)

    def wait_fault(self) -> int:
        """Address of the next fault, rounded to the host page."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        buffer: Any = ffi.new("char[]", 32)
        while True:
            assert poll.poll(_TIMEOUT_MS), "no fault within the time limit"
            count = lib.uffd_read(self.fd, ffi.cast("struct uffd_msg *", buffer), 1)
            assert count >= 0, os.strerror(-count)
            if count:
                event, _flags, address = struct.unpack("<B7xQQ8x", bytes(ffi.buffer(buffer, 32)))
                assert event == _PAGEFAULT
                return int(address) & -self._block.page_size

    def place(self, address: int, contents: bytes) -> None:
        """Place one host page; the sleeper goes on."""
        source = ffi.from_buffer("char[]", contents)
        start = int(ffi.cast("uintptr_t", source))
        placed = lib.uffd_copy(self.fd, address, start, len(contents), 0)
        assert placed == len(contents), placed

    def close(self) -> None:
        os.close(self.fd)


@contextlib.contextmanager
def missing_watch(block: RAMBlock) -> Iterator[MissingWatch]:
    """A :class:`MissingWatch` for a ``with`` block."""
    watch = MissingWatch(block)
    try:
        yield watch
    finally:
        watch.close()


class Toucher:
    """Runs one touch on a thread of its own, so that it may sleep."""

    def __init__(self, touch: Callable[[], object]) -> None:
        self.result: object = None
        self._touch = touch
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._touch()

    def join(self) -> object:
        """Wait for the touch to end; what it returned."""
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), "the toucher still sleeps"
        return self.result
