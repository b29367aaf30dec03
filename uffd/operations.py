"""What a context does to ranges: register, place, protect, poison, move, wake.

The base of :class:`uffd.fd.Userfaultfd`. The traps of the interface are settled here, once:

* results are counts of bytes or typed errors; the kernel's signed output field never leaks;
* a short count means that something is in the way just behind it: call again from there to learn
  what;
* EEXIST wakes nobody in the kernel, so the range is woken here before :class:`PageAlreadyPresent`;
* EEXIST on hugetlb with the page absent means an empty pool: :class:`HugepagePoolEmpty`;
* EAGAIN with nothing done means unread events: :class:`LayoutChanging`;
* UNREGISTER leaves write-protect and minor waiters asleep, so they are woken here.

Ranges are given as ``address, length`` or as one object that has both. Addresses and lengths are
multiples of the host page (4 KiB; on hugetlb the huge page), unless said otherwise.

Threads: every method may be called from any thread, and releases the interpreter lock while the
kernel works. Source: kernel ``mm/userfaultfd.c`` and the man pages ``UFFDIO_*(2const)``.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, overload, runtime_checkable

from uffd._native import ffi, lib
from uffd.errors import HugepagePoolEmpty, check, error_for
from uffd.flags import (
    DONTWAKE,
    MOVE_ALLOW_SRC_HOLES,
    PROTECT,
    PROTECT_DONTWAKE,
    TRANSFER_WP,
    Feature,
    Ioctls,
    Mode,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@runtime_checkable
class MemoryRange(Protocol):
    """Anything with an address and a length in bytes, such as :class:`uffd.mapping.Mapping`."""

    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Registration:
    """What REGISTER answered. ``ioctls`` over-promises MOVE on shared memory."""

    address: int
    length: int
    mode: Mode
    ioctls: Ioctls

    @property
    def is_hugetlb(self) -> bool:
        """hugetlb is the one memory type without ZEROPAGE."""
        return Ioctls.ZEROPAGE not in self.ioctls

    def __contains__(self, address: int) -> bool:
        return 0 <= address - self.address < self.length


def _span(start: "int | MemoryRange", length: int | None) -> tuple[int, int]:
    if isinstance(start, int):
        if length is None:
            raise TypeError("an address needs a length")
        return start, length
    return start.address, start.length if length is None else length


class RangeOperations:
    """Operations on ranges of one context; see the module's text for the common rules."""

    _fd: int
    _registrations: dict[tuple[int, int], Registration]
    #: False when the memory is another process's: residency cannot be looked at then.
    is_own_memory: bool

    def fileno(self) -> int:
        raise NotImplementedError

    # -- registration ---------------------------------------------------------------------------

    @overload
    def register(self, start: int, length: int, mode: Mode = ...) -> Registration: ...
    @overload
    def register(self, start: MemoryRange, length: Mode = ...) -> Registration: ...
    def register(
        self, start: int | MemoryRange, length: int | Mode = Mode.MISSING, mode: Mode = Mode.MISSING
    ) -> Registration:
        """Have faults of a range reported: ``register(region, mode)`` or ``register(address,
        length, mode)``.

        The mapping is split at the range's ends (mind ``vm.max_map_count``). Registering again
        replaces the mode up to Linux 7.2; from 7.3 dropping WP or RWP that way is refused, so
        unregister first, but mind that this lets missing pages read as zeros. MINOR without
        MISSING loses pages silently: those absent from the file read as zeros unreported.

        :param mode: MISSING and MINOR report absent pages; WP and RWP accesses to protected ones.
        :returns: the operations the kernel offers on the range.
        :raises InvalidRequest: unaligned, nothing mapped, a memory type that cannot (disk files,
            guest_memfd; MINOR on anonymous memory).
        :raises RangeOwnedElsewhere: another context has a page of it.
        :raises NotPermitted: a mapping that can never be written (read-only fd, write seal).
        """
        if isinstance(start, int):
            address, count = start, length
        else:
            mode = length if isinstance(length, Mode) else mode
            address, count = start.address, start.length
        ioctls = ffi.new("uint64_t *")
        result = lib.uffd_register(self.fileno(), address, count, int(mode), ioctls)
        check(result, "UFFDIO_REGISTER", address=address, length=count)
        registration = Registration(address, int(count), mode, Ioctls(ioctls[0]))
        self._registrations[address, int(count)] = registration
        return registration

    def unregister(
        self, start: int | MemoryRange, length: int | None = None, *, wake: bool = True
    ) -> None:
        """Stop reporting faults of a range, and wake whoever sleeps there.

        Missing pages then read as zeros: do it only when every page is in place. The kernel wakes
        waiters on missing pages only; write-protect and minor ones are woken here unless
        ``wake=False``.

        :raises InvalidRequest: unaligned, or part of the range is another context's.
        """
        address, count = _span(start, length)
        result = lib.uffd_unregister(self.fileno(), address, count)
        check(result, "UFFDIO_UNREGISTER", address=address, length=count)
        # Mostly what was registered as one; only other ranges are worth a look at all of them.
        if self._registrations.pop((address, count), None) is None:
            self._registrations = {
                key: r
                for key, r in self._registrations.items()
                if not (address <= r.address and r.address + r.length <= address + count)
            }
        if wake:
            self.wake(address, count)

    def wake(self, start: int | MemoryRange, length: int | None = None) -> None:
        """Wake the threads that sleep in a range; a page still missing is reported again.

        :raises InvalidRequest: unaligned or empty. The registration is not checked.
        """
        address, count = _span(start, length)
        result = lib.uffd_wake(self.fileno(), address, count)
        check(result, "UFFDIO_WAKE", address=address, length=count)

    # -- placing --------------------------------------------------------------------------------

    def copy(
        self,
        address: int,
        source: "ReadableBuffer | int",
        length: int | None = None,
        *,
        write_protect: bool = False,
        wake: bool = True,
    ) -> int:
        """Place pages with the bytes of ``source`` and wake whoever waits for them. Each page is
        atomic.

        :param source: a buffer, or an address in *this* process; needs no alignment. A file
            mapping that ends early, or memory that is itself registered and missing, makes this
            fail or wait.
        :param length: bytes; default the whole buffer. Whole huge pages on hugetlb.
        :param write_protect: the pages arrive write-protected (the range must be registered with
            WP).
        :param wake: ``False`` leaves the waiters asleep until :meth:`wake`.
        :returns: bytes placed, at least one page; short when something is in the way behind them.
        :raises PageAlreadyPresent: the first page is there. The range was woken (if ``wake``).
        :raises HugepagePoolEmpty: hugetlb, and the pool has no free page.
        :raises LayoutChanging: read the events, then retry.
        :raises RangeNotRegistered: also when the range crosses the end of its mapping.
        :raises BadAddress: the source is unreadable, or the page lies beyond its file's end.
        """
        if isinstance(source, int):
            if length is None:
                raise TypeError("a source address needs a length")
            origin, keep = source, None
        else:
            keep = ffi.from_buffer("uint8_t[]", source)
            length = len(keep) if length is None else length
            if length > len(keep):
                raise ValueError(f"length {length} exceeds the source's {len(keep)} bytes")
            origin = int(ffi.cast("uintptr_t", keep))
        mode = (TRANSFER_WP if write_protect else 0) | (0 if wake else DONTWAKE)

        def attempt(at: int, done: int) -> int:
            left = length - done
            result = lib.uffd_copy(self.fileno(), at, origin + done, left, mode)
            # On hugetlb the kernel copies with faults switched off; from a source that is not
            # mapped in it copies through a second huge page, and says ENOMEM when the pool has
            # but one.
            if result == -errno.ENOMEM and self._is_hugetlb(at):
                lib.mem_populate_read(origin + done, left)
                result = lib.uffd_copy(self.fileno(), at, origin + done, left, mode)
            return result

        return self._place("UFFDIO_COPY", attempt, address, length, wake)

    def zeropage(
        self, start: int | MemoryRange, length: int | None = None, *, wake: bool = True
    ) -> int:
        """Place zero pages. Private memory maps the shared zero page, shared memory allocates.

        :returns: bytes placed; short as in :meth:`copy`.
        :raises InvalidRequest: hugetlb (there it is a COPY of zeros).
        :raises PageAlreadyPresent: something is there, even a write-protect or poison marker.
        """
        address, count = _span(start, length)
        mode = 0 if wake else DONTWAKE
        return self._place(
            "UFFDIO_ZEROPAGE",
            lambda at, done: lib.uffd_zeropage(self.fileno(), at, count - done, mode),
            address,
            count,
            wake,
        )

    def continue_(
        self,
        start: int | MemoryRange,
        length: int | None = None,
        *,
        write_protect: bool = False,
        wake: bool = True,
    ) -> int:
        """Map pages the page cache already has (the answer to a minor fault). shmem and hugetlb.

        Earlier stores through another mapping of the file are visible before the page is.

        :returns: bytes mapped; short as in :meth:`copy`.
        :raises BadAddress: the page cache has no such page.
        :raises PageAlreadyPresent: already mapped; the range was woken (if ``wake``).
        """
        address, count = _span(start, length)
        mode = (TRANSFER_WP if write_protect else 0) | (0 if wake else DONTWAKE)
        return self._place(
            "UFFDIO_CONTINUE",
            lambda at, done: lib.uffd_continue(self.fileno(), at, count - done, mode),
            address,
            count,
            wake,
        )

    def poison(
        self, start: int | MemoryRange, length: int | None = None, *, wake: bool = True
    ) -> int:
        """Make absent pages raise SIGBUS when touched (Linux 6.6). A COPY or MADV_DONTNEED clears
        it.

        :returns: bytes poisoned; short as in :meth:`copy`.
        :raises PageAlreadyPresent: something is there, even a marker.
        """
        address, count = _span(start, length)
        mode = 0 if wake else DONTWAKE
        return self._place(
            "UFFDIO_POISON",
            lambda at, done: lib.uffd_poison(self.fileno(), at, count - done, mode),
            address,
            count,
            wake,
        )

    def move(
        self,
        address: int,
        source: int,
        length: int,
        *,
        allow_holes: bool = False,
        wake: bool = True,
    ) -> int:
        """Move pages out of ``source`` into missing pages at ``address`` (Linux 6.8), without
        copying.

        Private anonymous memory of this process only. Keep ``source`` MADV_DONTFORK: a page
        shared with a fork child stays unmovable until it is written again.

        :param allow_holes: holes of the source count as moved.
        :returns: bytes moved; short as in :meth:`copy`.
        :raises PageShared: a source page is not exclusive.
        :raises RangeNotRegistered: a source hole without ``allow_holes``, or an unmapped source.
        :raises InvalidRequest: wrong memory type, protections differ, one side mlocked, another
            process.
        """
        mode = (MOVE_ALLOW_SRC_HOLES if allow_holes else 0) | (0 if wake else DONTWAKE)
        return self._place(
            "UFFDIO_MOVE",
            lambda at, done: lib.uffd_move(self.fileno(), at, source + done, length - done, mode),
            address,
            length,
            wake,
        )

    def _place(
        self,
        operation: str,
        attempt: Callable[[int, int], int],
        address: int,
        length: int,
        wake: bool,
    ) -> int:
        """Run ``attempt(address, bytes done so far)`` until all is done or something is in the
        way.
        """
        done = 0
        while True:
            result = attempt(address + done, done)
            if result >= 0:
                done += result
                if done >= length or result == 0:
                    return done
                continue
            if done:
                return done
            self._refuse(-result, operation, address, length, wake)

    def _refuse(self, code: int, operation: str, address: int, length: int, wake: bool) -> None:
        if operation == "UFFDIO_COPY" and self._is_pool_empty(code, address):
            note = "no free huge page (raise nr_hugepages, or reserve when mapping)"
            raise HugepagePoolEmpty(code, operation, address=address, length=length, note=note)
        if code == errno.EEXIST and wake:
            self.wake(address, length)
        raise error_for(code, operation, address=address, length=length)

    def _is_hugetlb(self, address: int) -> bool:
        return any(r.is_hugetlb and address in r for r in self._registrations.values())

    def _is_pool_empty(self, code: int, address: int) -> bool:
        """ENOMEM on hugetlb, or EEXIST for a page that is not resident.

        Only hugetlb: other memory may be swapped out.
        """
        if code == errno.ENOMEM:
            return self._is_hugetlb(address)
        return (
            code == errno.EEXIST
            and self.is_own_memory
            and self._is_hugetlb(address)
            and lib.mem_resident(address, 1) == 0
        )

    # -- protection -----------------------------------------------------------------------------

    def write_protect(self, start: int | MemoryRange, length: int | None = None) -> None:
        """Write-protect pages of a WP-registered range. All or nothing.

        Anonymous holes are skipped unless the context has WP_UNPOPULATED; shared memory's get a
        marker.

        :raises RangeNotRegistered: not registered with WP.
        :raises LayoutChanging: nothing was done; read events and retry.
        """
        self._protect("UFFDIO_WRITEPROTECT", lib.uffd_writeprotect, start, length, PROTECT)

    def write_unprotect(
        self, start: int | MemoryRange, length: int | None = None, *, wake: bool = True
    ) -> None:
        """Resolve write-protect faults: allow writes again and wake the writers. Errors as
        above.
        """
        mode = 0 if wake else PROTECT_DONTWAKE
        self._protect("UFFDIO_WRITEPROTECT", lib.uffd_writeprotect, start, length, mode)

    def read_write_protect(self, start: int | MemoryRange, length: int | None = None) -> None:
        """Protect present pages of an RWP-registered range against any access (Linux 7.3).

        :raises InvalidRequest: also on every kernel that has no RWP.
        """
        self._protect("UFFDIO_RWPROTECT", lib.uffd_rwprotect, start, length, PROTECT)

    def read_write_unprotect(
        self, start: int | MemoryRange, length: int | None = None, *, wake: bool = True
    ) -> None:
        """Resolve read/write-protect faults (Linux 7.3)."""
        mode = 0 if wake else PROTECT_DONTWAKE
        self._protect("UFFDIO_RWPROTECT", lib.uffd_rwprotect, start, length, mode)

    def _protect(
        self,
        operation: str,
        call: Callable[[int, int, int, int], int],
        start: int | MemoryRange,
        length: int | None,
        mode: int,
    ) -> None:
        address, count = _span(start, length)
        result = call(self.fileno(), address, count, mode)
        check(result, operation, address=address, length=count)

    def set_mode(self, *, enable: Feature = Feature.NONE, disable: Feature = Feature.NONE) -> None:
        """Switch RWP_ASYNC of the whole context at run time (Linux 7.3). Enabling wakes every
        waiter.

        :raises InvalidRequest: the same bit in both, any other bit, or a kernel without it.
        """
        check(lib.uffd_set_mode(self.fileno(), int(enable), int(disable)), "UFFDIO_SET_MODE")
