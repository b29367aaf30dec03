"""Which pages a start asked for, and giving them first the next time.

The file is JSON lines: a head, then one line per request in the order they came (``us`` since the
package went out): ``{"block": "pc.ram", "offset": 4096, "length": 4096, "us": 812}``.
The set of pages repeats from start to start far better than their order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guestmem import RAMList
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from migration.native import ffi, lib

from .manifest import ParkError

CAPACITY = 1 << 20
_KIND = "postcopy working set"


class RequestLog:
    """Collects the requests of one migration natively: up to :data:`CAPACITY` of them."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._entries = ffi.new("struct src_log_entry[]", CAPACITY)
        lib.src_set_log(source, int(ffi.cast("uintptr_t", self._entries)), CAPACITY)

    def save(self, path: Path, ram: RAMList) -> int:
        """Write the file; returns the number of requests."""
        names = [block.idstr for block in ram]
        count = int(lib.src_log_count(self._source))
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"kind": _KIND, "format": 1, "requests": count}) + "\n")
            for index in range(count):
                entry = self._entries[index]
                line = {
                    "block": names[entry.block],
                    "offset": int(entry.first) << TARGET_PAGE_BITS,
                    "length": int(entry.count) << TARGET_PAGE_BITS,
                    "us": int(entry.ns) // 1000,
                }
                file.write(json.dumps(line) + "\n")
        return count


@dataclass(frozen=True, slots=True)
class Prefetch:
    """The pages of a recorded start, to be pushed before everything else.

    :ivar pages: ``(block index, target page)``, each once, in the order they were asked for.
    """

    pages: tuple[tuple[int, int], ...]

    @classmethod
    def load(cls, path: Path, ram: RAMList) -> Prefetch:
        """:raises ParkError: not such a file, or of another VM."""
        blocks = {block.idstr: (number, block) for number, block in enumerate(ram)}
        pages: dict[tuple[int, int], None] = {}
        try:
            with open(path, encoding="utf-8") as file:
                head = json.loads(next(file))
                if head["kind"] != _KIND or head["format"] != 1:
                    raise ValueError("another kind of file")
                for line in file:
                    entry = json.loads(line)
                    number, block = blocks[entry["block"]]
                    start, length = int(entry["offset"]), int(entry["length"])
                    if start < 0 or length <= 0 or start + length > block.placed_length:
                        raise ValueError(f"[{start:#x}, +{length:#x}) is not in {block.idstr}")
                    # All of it: the pages of the next destination may be smaller.
                    for at in range(start, start + length, TARGET_PAGE_BYTES):
                        pages.setdefault((number, at >> TARGET_PAGE_BITS))
        except (OSError, ValueError, KeyError, StopIteration, TypeError) as error:
            raise ParkError(
                f"{path} is no working-set record of this VM: {_words(error)}"
            ) from None
        return cls(tuple(pages))

    def begin(self, source: Any) -> object:
        """Have them pushed first.

        :returns: the list in C memory; keep it until the migration ended.
        """
        requests = ffi.new("struct src_request[]", max(1, len(self.pages)))
        for request, (block, page) in zip(requests, self.pages, strict=False):
            request.block, request.first, request.count = block, page, 1
        lib.src_set_prefetch(source, int(ffi.cast("uintptr_t", requests)), len(self.pages))
        return requests


def _words(error: Exception) -> str:
    match error:
        case OSError():
            return error.strerror or str(error)
        case KeyError():
            return f"it has no {error}"
        case StopIteration():
            return "it is empty"
    return str(error)
