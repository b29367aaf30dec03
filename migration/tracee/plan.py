"""What a replacement will do to the other process, known to two of ours before it is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from .errors import TraceeError
from .mappings import ProcessMapping

_LOWEST, _HIGHEST = 1 << 32, 0x7000_0000_0000


@dataclass(frozen=True, slots=True)
class Plan:
    """Addresses are the other process's, lengths bytes, all multiples of ``page_size``.

    :ivar start: what is replaced. :ivar aside: where its pages go meanwhile.
    :ivar fresh: where the new mapping is made.
    :ivar uffds: descriptors of userfaultfds it had before.
    """

    pid: int
    tid: int
    start: int
    length: int
    page_size: int
    aside: int
    fresh: int
    uffds: tuple[int, ...]

    def encode(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """Undo :meth:`encode`."""
        fields = json.loads(line)
        return cls(**{**fields, "uffds": tuple(fields["uffds"])})

    @property
    def end(self) -> int:
        """Behind the last byte that is replaced."""
        return self.start + self.length


def find_room(maps: list[ProcessMapping], length: int, alignment: int) -> int:
    """Address of ``length`` unmapped bytes; between and above everything stays a gap.

    :raises TraceeError: there is none.
    """
    bounds = [(_LOWEST, _LOWEST), *((m.start, m.end) for m in maps), (_HIGHEST, _HIGHEST)]
    for (_, end), (start, _) in zip(reversed(bounds[:-1]), reversed(bounds[1:]), strict=True):
        address = (min(start, _HIGHEST) - length - alignment) & -alignment
        if address >= max(end + alignment, _LOWEST):
            return address
    raise TraceeError(f"no room for {length >> 20} MiB of addresses in the process")
