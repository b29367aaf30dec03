"""Touching guest memory: the accessors of a RAMBlock.

Each does its work in C with the GIL released. A touch of a page that a userfaultfd watches and
that is missing sleeps until someone places the page; the GIL is free meanwhile, so that someone
may be a Python thread.

A page that will never come answers SIGBUS. It is caught and turned into an exception while at least
one block is open, by a handler that passes every other SIGBUS on to whoever had it before. Handlers
installed over it later (``faulthandler.enable``) must come first to stay out of the way.
"""

from collections.abc import Callable

from guestmem._native import ffi, lib
from guestmem.errors import GuestMemoryLost

_U64_BYTES = 8


class BlockAccess:
    """Loads and stores in ``[host, host + used_length)``, by offset from its start.

    Any number of threads at once; what two writers leave in one place is up to the hardware.
    Every method raises :class:`ValueError` naming block and range when it would leave the block,
    or when the block is closed; nothing is touched then. And :class:`GuestMemoryLost` naming block
    and offset when a page will never come (its migration was given up, or the kernel cannot provide
    it); what lies before that page may have been done.
    """

    __slots__ = ("_write_watchers", "host", "idstr", "used_length")

    idstr: str
    host: int
    used_length: int

    def __init__(self, idstr: str, host: int, used_length: int) -> None:
        self.idstr = idstr
        self.host = host
        self.used_length = used_length
        self._write_watchers: tuple[Callable[[int, int], None], ...] = ()

    def watch_writes(self, watcher: Callable[[int, int], None]) -> None:
        """Have ``watcher(offset, length)`` called after each write by an accessor, on the writing
        thread. Raw views and native code are not watched."""
        self._write_watchers += (watcher,)

    def unwatch_writes(self, watcher: Callable[[int, int], None]) -> None:
        """Undo :meth:`watch_writes`."""
        self._write_watchers = tuple(w for w in self._write_watchers if w != watcher)

    def _wrote(self, offset: int, length: int) -> None:
        for watcher in self._write_watchers:
            watcher(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``. May sleep on a missing page, without the GIL."""
        buffer = bytearray(length if length > 0 else 0)
        self.read_into(offset, buffer, length)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: bytearray | memoryview, length: int) -> None:
        """Like :meth:`read`, into the first ``length`` bytes of ``buffer``, which must not be
        guest memory: it is written by the same call."""
        address = self._address(offset, length)
        if len(buffer) < length:
            raise ValueError(f"a buffer of {len(buffer)} bytes for {length}")
        if lib.access_read(address, ffi.from_buffer(buffer), length):
            raise self._lost("reading")

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``offset``. May sleep on a missing page, without the GIL."""
        source = ffi.from_buffer(data)
        result = lib.access_write(self._address(offset, len(source)), source, len(source))
        self._wrote(offset, len(source))
        if result:
            raise self._lost("writing")

    def fill(self, offset: int, length: int, byte: int) -> None:
        """Store ``byte`` (0..255) ``length`` times. May sleep, without the GIL."""
        result = lib.access_fill(self._address(offset, length), byte, length)
        self._wrote(offset, length)
        if result:
            raise self._lost("filling")

    def move(self, dst_offset: int, src_offset: int, length: int) -> None:
        """Copy inside the block; the ranges may overlap. May sleep, without the GIL."""
        dst, src = self._address(dst_offset, length), self._address(src_offset, length)
        result = lib.access_move(dst, src, length)
        self._wrote(dst_offset, length)
        if result:
            raise self._lost("moving")

    def is_zero(self, offset: int, length: int) -> bool:
        """Is every byte of the range zero? Reads it, so it may sleep, without the GIL."""
        result = lib.access_is_zero(self._address(offset, length), length)
        if result < 0:
            raise self._lost("reading")
        return bool(result)

    def load_u64(self, offset: int) -> int:
        """Atomic load, acquire, host byte order; ``offset`` is a multiple of 8. May sleep."""
        out = lib.access_load_u64(self._address_u64(offset))
        if out.result:
            raise self._lost("reading")
        return int(out.value)

    def store_u64(self, offset: int, value: int) -> None:
        """Atomic store, release, host byte order; ``offset`` is a multiple of 8. May sleep."""
        result = lib.access_store_u64(self._address_u64(offset), value)
        self._wrote(offset, _U64_BYTES)
        if result:
            raise self._lost("writing")

    def fetch_add_u64(self, offset: int, value: int) -> int:
        """Atomic add modulo 2**64; the old value. ``offset`` is a multiple of 8. May sleep."""
        out = lib.access_fetch_add_u64(self._address_u64(offset), value)
        self._wrote(offset, _U64_BYTES)
        if out.result:
            raise self._lost("adding")
        return int(out.value)

    def unsafe_view(self) -> memoryview:
        """The used part as a writable memoryview. Dangerous, in three ways:

        - Touching a missing page through it sleeps **holding the GIL**: no Python thread runs
          until the page is placed, so only a native thread can place it.
        - It does not keep the mapping alive: touching it after :meth:`close` is SIGSEGV.
        - Touching a lost page through it is a SIGBUS that ends the process.
        """
        start = self._address(0, self.used_length)
        return memoryview(ffi.buffer(ffi.cast("char *", start), self.used_length))

    def _address(self, offset: int, length: int) -> int:
        if not self.host:
            raise ValueError(f"block {self.idstr!r} is closed")
        if offset < 0 or length < 0 or offset + length > self.used_length:
            raise ValueError(
                f"block {self.idstr!r}: [{offset:#x}, {offset + length:#x}) is outside its "
                f"{self.used_length:#x} bytes"
            )
        return self.host + offset

    def _address_u64(self, offset: int) -> int:
        if offset % _U64_BYTES:
            raise ValueError(f"block {self.idstr!r}: offset {offset:#x} is no multiple of 8")
        return self._address(offset, _U64_BYTES)

    def _lost(self, doing: str) -> GuestMemoryLost:
        return GuestMemoryLost(self.idstr, lib.access_last_lost() - self.host, doing)
