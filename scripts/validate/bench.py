"""What a case is given: its memory type, fresh memory, contexts, and a place for remarks."""

import itertools

from scripts.validate import kinds
from scripts.validate.check import expect, same
from scripts.validate.host import Host
from scripts.validate.kinds import Kind
from uffd import Feature, Mapping, Mode, Pagemap, PagemapEntry, Userfaultfd


class Bench:
    """One case's view of the world. Nothing is closed: the case's process ends soon."""

    def __init__(self, kind: Kind | None, variant: str, host: Host) -> None:
        self._kind = kind
        self.variant = variant
        self.host = host
        #: What was seen where kernels differ, for the report.
        self.remarks: list[str] = []

    @property
    def kind(self) -> Kind:
        """:raises LookupError: the case has no memory type."""
        if self._kind is None:
            raise LookupError(f"variant {self.variant!r} names no memory type")
        return self._kind

    @property
    def modifiers(self) -> list[str]:
        """What follows the memory type in the variant: ``anon:swapped`` has ``swapped``."""
        return self.variant.split(":")[1:]

    @property
    def has_rwp(self) -> bool:
        return Feature.RWP in self.features

    @property
    def features(self) -> Feature:
        return self.host.features or Feature.NONE

    def map(self, pages: int = 4) -> Mapping:
        return self.kind.map(pages)

    def open(self, features: Feature = Feature.NONE, *, nonblocking: bool = True) -> Userfaultfd:
        return Userfaultfd.open(features, user_mode_only=False, nonblocking=nonblocking)

    def registered(
        self, mode: Mode = Mode.MISSING, features: Feature = Feature.NONE, pages: int = 4
    ) -> tuple[Userfaultfd, Mapping]:
        """A context and fresh memory registered with it."""
        uffd, memory = self.open(features), self.map(pages)
        uffd.register(memory, mode)
        return uffd, memory

    def page(self, index: int, salt: int = 0) -> bytes:
        """The bytes of one host page."""
        return kinds.page_bytes(index, self.kind.page_size, salt)

    def holds(self, memory: Mapping, index: int, expected: bytes, what: str = "") -> None:
        """Host page ``index`` of ``memory`` must hold ``expected``."""
        size = memory.page_size
        what = what or f"page {index}"
        same(memory.read(index * size, size), expected, f"contents of {what}")

    def remark(self, text: str) -> None:
        """Which of the documented behaviours this kernel shows."""
        self.remarks.append(text)

    def either(self, what: str, got: object, **kernels: object) -> None:
        """One of the documented answers; the remark says whose: ``up_to_7_2=...``.

        :raises CheckFailed: none of them.
        """
        like = [name for name, answer in kernels.items() if answer == got]
        known = "; ".join(f"{_spoken(n)}: {a!r}" for n, a in kernels.items())
        expect(bool(like), f"{what}: {got!r} is no documented behaviour ({known})")
        self.remark(f"{what}: {got} ({_spoken(like[0])})")


def _spoken(name: str) -> str:
    """``up_to_7_2`` as ``up to 7.2``."""
    parts = name.split("_")
    out = parts[:1]
    for before, part in itertools.pairwise(parts):
        glue = "." if before.isdigit() and part.isdigit() else " "
        out.append(glue + part)
    return "".join(out)


def entry(address: int) -> PagemapEntry:
    """The pagemap entry of one base page of this process."""
    with Pagemap() as pagemap:
        return pagemap.entries(address, 1)[0]


def marked(memory: Mapping) -> list[bool]:
    """For each host page, whether its first base page is write-protected by userfaultfd."""
    return [entry(memory.page(i)).is_write_protected for i in range(memory.page_count)]


def present(memory: Mapping) -> list[bool]:
    return [entry(memory.page(i)).is_present for i in range(memory.page_count)]
