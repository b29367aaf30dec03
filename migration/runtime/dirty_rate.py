"""How fast a guest dirties its memory: ``calc-dirty-rate`` by sampling pages.

A share of the pages is read twice, some time apart, and what differs is reckoned up to all of RAM.
The guest runs on undisturbed; a page written back to what it was is not seen, as in QEMU.

Source: QEMU ``qapi/migration.json`` (DirtyRateInfo).
"""

from __future__ import annotations

import random
import threading
import time
import zlib

from guestmem import RAMList
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from uffd.threads import NamedThread

from .errors import MigrationError

SAMPLE_PAGES = 512
SAMPLE_PAGES_RANGE = (128, 4 << 10)
CALC_TIME_MS_RANGE = (50, 60_000)
_GIB_BITS, _MIB_BITS = 30, 20


class DirtyRate:
    """One measurement at a time, in a thread of its own. Any thread may ask."""

    def __init__(self, ram: RAMList) -> None:
        self._ram = ram
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._status = "unstarted"
        self._rate: int | None = None
        self._start_s = 0
        self._calc_ms = 0
        self._sample_pages = SAMPLE_PAGES

    def start(self, calc_time_ms: int, sample_pages: int = SAMPLE_PAGES) -> None:
        """Begin to measure.

        :param sample_pages: target pages per GiB of RAM.
        :raises MigrationError: one is under way, or a value is out of its range.
        """
        for what, value, (low, high) in (
            ("calc-time", calc_time_ms, CALC_TIME_MS_RANGE),
            ("sample-pages", sample_pages, SAMPLE_PAGES_RANGE),
        ):
            if not low <= value <= high:
                unit = " ms" if what == "calc-time" else ""
                raise MigrationError(f"{what} {value} is out of range [{low}, {high}]{unit}")
        with self._lock:
            if self._status == "measuring":
                raise MigrationError("the dirty rate is already being measured")
            self._status, self._rate = "measuring", None
            self._start_s, self._calc_ms = int(time.time()), calc_time_ms
            self._sample_pages = sample_pages
            self._thread = NamedThread(target=self._measure, name="dirty-rate", daemon=True)
            self._thread.start()

    def query(self, unit: str = "second") -> dict[str, object]:
        """``query-dirty-rate``: the rate in MiB/s once it is there."""
        with self._lock:
            scale = 1 if unit == "millisecond" else 1000
            info: dict[str, object] = {
                "status": self._status,
                "start-time": self._start_s,
                "calc-time": self._calc_ms // scale,
                "calc-time-unit": unit,
                "sample-pages": self._sample_pages,
                "mode": "page-sampling",
            }
            if self._rate is not None:
                info["dirty-rate"] = self._rate
            return info

    def close(self) -> None:
        """Give up; waits for the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _measure(self) -> None:
        begun = time.monotonic()
        pages = self._choose()
        before = [self._sum(idstr, offset) for idstr, offset in pages]
        self._closing.wait(max(0.0, begun + self._calc_ms / 1000 - time.monotonic()))
        taken = time.monotonic() - begun
        changed = 0
        if not self._closing.is_set():
            for (idstr, offset), old in zip(pages, before, strict=True):
                changed += self._sum(idstr, offset) != old
        share = changed / len(pages) if pages else 0.0
        with self._lock:
            self._rate = round(share * self._ram.total_length / (1 << _MIB_BITS) / taken)
            self._status = "measured"

    def _choose(self) -> list[tuple[str, int]]:
        """Pages at random, from every block as its length tells."""
        pages = []
        for block in self._ram:
            count = block.used_length >> TARGET_PAGE_BITS
            wanted = -(-block.used_length * self._sample_pages >> _GIB_BITS)
            for index in random.sample(range(count), min(count, max(1, wanted))):
                pages.append((block.idstr, index << TARGET_PAGE_BITS))
        return pages

    def _sum(self, idstr: str, offset: int) -> int:
        return zlib.crc32(self._ram.by_idstr(idstr).read(offset, TARGET_PAGE_BYTES))
