"""Memory whose writes are tracked asynchronously (WP_ASYNC), and scans of it in page indices."""

from dataclasses import dataclass

from scripts.validate.check import same
from scripts.validate.kinds import PAGE
from uffd import (
    Category,
    Feature,
    Mapping,
    Mode,
    Pagemap,
    ScanFlag,
    ScanResult,
    Userfaultfd,
    touch,
)

FEATURES = Feature.WP_ASYNC
WRITTEN, PRESENT = Category.WRITTEN, Category.PRESENT
PROTECT = ScanFlag.WP_MATCHING
CHECK = ScanFlag.CHECK_WPASYNC


def open_tracking() -> Userfaultfd:
    return Userfaultfd.open(
        FEATURES | Feature.PAGEFAULT_FLAG_WP,
        optional=Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM,
        user_mode_only=False,
    )


@dataclass
class Tracked:
    """A registered range; indices count granules of ``page`` bytes."""

    uffd: Userfaultfd
    pagemap: Pagemap
    address: int
    length: int
    page: int = PAGE

    @classmethod
    def of(cls, memory: Mapping, *, populate: bool = True) -> "Tracked":
        """Written once all over (unless told), registered, and everything protected."""
        if populate:
            touch.fill(memory.address, 1, memory.length)
        tracked = cls(open_tracking(), Pagemap(), memory.address, memory.length, memory.page_size)
        tracked.uffd.register(memory.address, memory.length, Mode.WP)
        tracked.protect()
        return tracked

    @property
    def end(self) -> int:
        return self.address + self.length

    @property
    def count(self) -> int:
        return self.length // self.page

    def at(self, index: int) -> int:
        return self.address + index * self.page

    def protect(self) -> None:
        """Mark everything clean."""
        self.uffd.write_protect(self.address, self.length)

    def write(self, *indices: int) -> None:
        for index in indices:
            touch.store(self.at(index), 0x5A)

    def scan(
        self,
        *,
        mask: Category = WRITTEN,
        returned: Category = WRITTEN,
        flags: ScanFlag = ScanFlag.NONE,
        max_regions: int = 1024,
        max_pages: int = 0,
        start: int = 0,
        end: int | None = None,
    ) -> ScanResult:
        """Scan granules [start, end)."""
        stop = self.end if end is None else self.at(end)
        return self.pagemap.scan(
            self.at(start),
            stop,
            mask=mask,
            returned=returned,
            flags=flags,
            max_regions=max_regions,
            max_pages=max_pages,
        )

    def runs(self, result: ScanResult) -> list[tuple[int, int]]:
        """Regions as (first, behind last) indices; the end is rounded up to whole granules."""
        return [
            ((r.start - self.address) // self.page, -(-(r.end - self.address) // self.page))
            for r in result.regions
        ]

    def written(self, flags: ScanFlag = ScanFlag.NONE) -> list[tuple[int, int]]:
        """What was written, as runs."""
        return self.runs(self.scan(flags=flags))

    def expect_written(self, expected: list[tuple[int, int]], what: str) -> None:
        same(self.written(), expected, what)
