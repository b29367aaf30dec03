"""All RAMBlocks of a machine, in the order in which they were added."""

from collections.abc import Iterable, Iterator
from typing import Self

from guestmem.ramblock import RAMBlock


class RAMList:
    """A machine's RAMBlocks. Owns them: :meth:`close` closes every block.

    Reading it may happen from any thread; :meth:`add` and :meth:`close` must not run at the same
    time as anything else.
    """

    def __init__(self, blocks: Iterable[RAMBlock] = ()) -> None:
        """:raises ValueError: two blocks have one name. None is closed then."""
        self._blocks: dict[str, RAMBlock] = {}
        for block in blocks:
            self.add(block)

    def add(self, block: RAMBlock) -> None:
        """Append a block. :raises ValueError: its name is taken."""
        if block.idstr in self._blocks:
            raise ValueError(f"two RAM blocks named {block.idstr!r}")
        self._blocks[block.idstr] = block

    def __iter__(self) -> Iterator[RAMBlock]:
        return iter(tuple(self._blocks.values()))

    def __len__(self) -> int:
        return len(self._blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def by_idstr(self, idstr: str) -> RAMBlock:
        """The block of that name. :raises KeyError: there is none."""
        return self._blocks[idstr]

    def find(self, address: int) -> tuple[RAMBlock, int]:
        """The block that an address of ours is in, and the offset there; aliases count.

        :raises LookupError: no block is mapped there.
        """
        for block in self._blocks.values():
            for mapping in block.mappings:
                if address in mapping:
                    return block, address - mapping.host
        raise LookupError(f"no RAM block is mapped at {address:#x}")

    def with_guest_addresses(self) -> Iterator[tuple[RAMBlock, int]]:
        """Each block, and where the guest has it as far as a stream is concerned: one block behind
        the other from 0, where QEMU's ``none`` machine has its only one."""
        address = 0
        for block in self:
            yield block, address
            address += block.placed_length

    @property
    def total_length(self) -> int:
        """Bytes in use, of all blocks."""
        return sum(block.used_length for block in self._blocks.values())

    def close(self) -> None:
        """Close every block. Join all threads that touch guest RAM first."""
        for block in self:
            block.close()
