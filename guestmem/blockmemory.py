"""What a RAMBlock is mapped to: its mappings, what is behind them, and advice for all of them."""

import errno
import mmap
import os

from guestmem._native import lib
from guestmem.access import BlockAccess
from guestmem.backings import Backing, Source
from guestmem.errors import GuestMemoryError, check
from guestmem.geometry import THP_BYTES
from guestmem.mapping import Mapping
from guestmem.numa import NumaPolicy
from guestmem.shortage import explain_shortage

# Advice that throws contents away behind the bitmaps' back; RAMBlock.discard() is the way.
_DISCARDING = frozenset({mmap.MADV_DONTNEED, mmap.MADV_FREE, mmap.MADV_REMOVE})


class BlockMemory(BlockAccess):
    """One memory, mapped at ``host`` and as often again as somebody wants an alias.

    Fields and threads: see :class:`guestmem.ramblock.RAMBlock`.
    """

    __slots__ = (
        "_mappings",
        "_source",
        "_thp",
        "backing",
        "max_length",
        "page_size",
        "policy",
        "was_preallocated",
    )

    def __init__(
        self, idstr: str, used_length: int, backing: Backing, source: Source, mapping: Mapping
    ) -> None:
        """The block owns ``source.fd`` and ``mapping`` from here on."""
        super().__init__(idstr, mapping.host, used_length)
        self.backing = backing
        self.max_length = source.length
        self.page_size = source.page_size
        self._source: Source | None = source
        self._mappings = [mapping]
        self.policy: NumaPolicy | None = None
        self.was_preallocated = False
        self._thp: bool | None = None
        check(lib.access_install(), "catching SIGBUS")

    @property
    def fd(self) -> int | None:
        """The file behind the block (close-on-exec, owned by the block), ``None`` if private."""
        return self._open().fd

    @property
    def is_shared(self) -> bool:
        """Do all mappings of the block see one memory? False for private anonymous memory."""
        return self._open().fd is not None

    @property
    def is_hugetlb(self) -> bool:
        """Is it made of huge pages from a pool?"""
        return self._open().is_hugetlb

    @property
    def is_reserved(self) -> bool:
        """Are its huge pages promised beforehand? True for memory without a pool, too."""
        return self._open().is_reserved

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """Every mapping of the block: the one at ``host`` first, then the aliases."""
        return tuple(self._mappings)

    @property
    def thp(self) -> bool | None:
        """What :meth:`set_thp` said last; ``None``: the host's default."""
        return self._thp

    def set_thp(self, enabled: bool) -> None:
        """Let transparent huge pages form (``MADV_HUGEPAGE``) or not, on **every** mapping.

        Aliases made later follow. Pages that are huge already stay so until they are discarded.
        No effect on hugetlb. Off must come before pages are placed one by one: one huge page
        formed by the kernel would cover, with zeros, pages that have not arrived.

        :raises GuestMemoryError: ``EINVAL`` when switched on in a kernel built without.
        """
        self._open()
        for mapping in self._mappings:
            _set_thp(mapping, enabled, f"block {self.idstr!r}")
        self._thp = enabled

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """madvise(2) on every mapping of the block, for a part or all of it.

        :raises ValueError: advice that discards (see :meth:`discard`), or outside the block.
        :raises GuestMemoryError: with the kernel's errno.
        """
        self._open()
        if advice in _DISCARDING:
            raise ValueError("advice that discards pages: use discard()")
        length = self.max_length - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.max_length:
            raise ValueError(
                f"block {self.idstr!r}: advice for [{offset:#x}, {offset + length:#x})"
            )
        for mapping in self._mappings:
            mapping.advise(advice, offset, length, what=f"block {self.idstr!r}")

    def set_policy(self, policy: NumaPolicy) -> None:
        """Take pages from these NUMA nodes from now on; those that exist are moved there.

        :raises GuestMemoryError: see :meth:`guestmem.numa.NumaPolicy.apply`.
        """
        self._open()
        for mapping in self._mappings:
            policy.apply(mapping.host, mapping.length, f"block {self.idstr!r}")
        self.policy = policy

    def add_alias(self) -> Mapping:
        """Map the whole block a second time; the block closes the mapping with itself.

        :raises ValueError: private memory has no second view.
        :raises GuestMemoryError: with mmap(2)'s errno.
        """
        source = self._open()
        if source.fd is None:
            raise ValueError(f"block {self.idstr!r} is private memory: it cannot be mapped twice")
        what = f"alias of block {self.idstr!r}"
        alias = map_source(source, what)
        try:
            if self.policy is not None:
                self.policy.apply(alias.host, alias.length, what)
            if self._thp is not None:
                _set_thp(alias, self._thp, what)
        except BaseException:
            alias.close()
            raise
        self._mappings.append(alias)
        return alias

    def remove_alias(self, alias: Mapping) -> None:
        """Unmap what :meth:`add_alias` returned. :raises ValueError: not an alias of this block."""
        if alias not in self._mappings[1:]:
            raise ValueError(f"{alias!r} is no alias of block {self.idstr!r}")
        self._mappings.remove(alias)
        alias.close()

    def close(self) -> None:
        """Unmap everything and close the file. Harmless the second time.

        Join every thread that touches the block first: later touches are SIGSEGV.
        """
        source, self._source = self._source, None
        if source is None:
            return
        self.host = 0
        lib.access_uninstall()
        while self._mappings:
            self._mappings.pop().close()
        if source.fd is not None:
            os.close(source.fd)

    def _open(self) -> Source:
        if self._source is None:
            raise ValueError(f"block {self.idstr!r} is closed")
        return self._source

    def _map_everywhere(self, source: Source, fd: int, what: str) -> None:
        for mapping in self._mappings:
            mapping.replace(source.map_flags, fd, what=what)
            if self._thp is not None:
                _set_thp(mapping, self._thp, what)


def map_source(source: Source, what: str) -> Mapping:
    """A mapping of all of it, at an address its pages can be huge at.

    :raises HugepagesShort, GuestMemoryError: as :meth:`guestmem.ramblock.RAMBlock.allocate`.
    """
    # Address and offset congruent modulo 2 MiB: else no huge page can ever form.
    alignment = max(source.page_size, THP_BYTES if source.length >= THP_BYTES else 0)
    fd = -1 if source.fd is None else source.fd
    try:
        return Mapping(source.length, alignment=alignment, flags=source.map_flags, fd=fd, what=what)
    except GuestMemoryError as error:
        if error.errno == errno.ENOMEM and source.is_hugetlb:
            short = explain_shortage(what, source.page_size, source.length)
            if short is not None:
                raise short from None
        raise


def _set_thp(mapping: Mapping, enabled: bool, what: str) -> None:
    try:
        mapping.advise(mmap.MADV_HUGEPAGE if enabled else mmap.MADV_NOHUGEPAGE, what=what)
    except GuestMemoryError as error:
        # A kernel without transparent huge pages has nothing to switch off.
        if enabled or error.errno != errno.EINVAL:
            raise
