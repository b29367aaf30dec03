"""What can happen to a stream on the way: each class is one mishap, told where to strike.

A tamper sees every element of both directions in order and answers with the elements to forward
instead. It counts its strikes in ``hits`` and sets ``struck``, so that a test can insist that the
damage was really done. Nothing here repairs checksums: against checksums, the damage must be found.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from tests.support.stream_elements import TARGET_PAGE_BYTES, Element, Kind, Phase

Matcher = Callable[[Element], bool]


class Interruption(Exception):
    """The stream stops here: forward ``first``, then let the ``tamper`` know that it struck."""

    def __init__(self, tamper: Tamper, element: Element, after: int | None) -> None:
        super().__init__(f"{type(tamper).__name__} at {element.kind} {element.name}")
        self.tamper, self.element = tamper, element
        after = len(element.data) if after is None else after
        self.first, self.rest = element.wire(0, after), element.wire(after)


class Cut(Interruption):
    """The connection ends for both sides; ``rest`` is lost."""


class Hold(Interruption):
    """``rest`` and all that follows wait for the tamper's ``go_on``. This direction only."""

    def __init__(self, tamper: StallAt, element: Element, after: int | None) -> None:
        super().__init__(tamper, element, after)
        self.until = tamper.released


def command(name: str) -> Matcher:
    """The main stream's command of that name: ``"PACKAGED"``, ``"RUN"``, ``"PING"``."""
    return lambda e: e.kind is Kind.COMMAND and e.name == name


def message(name: str) -> Matcher:
    """The return path's message of that name: ``"SHUT"``, ``"PONG"``, ``"REQ_PAGES"``."""
    return lambda e: e.kind is Kind.RETURN and e.name == name


def kind(wanted: Kind, phase: Phase | None = None) -> Matcher:
    """Any element of a kind, in one phase or in any."""
    return lambda e: e.kind is wanted and phase in (None, e.phase)


def page(phase: Phase | None = None) -> Matcher:
    """A RAM record that carries a page's data."""
    return kind(Kind.PAGE, phase)


class Tamper(ABC):
    """Base: strikes at the ``nth`` (from 0) element that ``where`` matches."""

    def __init__(self, where: Matcher, nth: int = 0) -> None:
        self.where = where
        self.hits = 0
        self.struck = threading.Event()
        self.victim: Element | None = None
        self._before = nth

    def is_due(self, element: Element) -> bool:
        """Count matches; true exactly once."""
        if self.hits or not self.where(element):
            return False
        self._before -= 1
        return self._before < 0

    def strike(self, victim: Element) -> None:
        """Note that the damage is done to ``victim``."""
        self.hits += 1
        self.victim = victim
        self.struck.set()

    @abstractmethod
    def see(self, element: Element) -> list[Element]:
        """What to forward in place of ``element``; may raise :class:`Cut` or :class:`Hold`."""

    def finish(self) -> list[Element]:
        """Elements still held when the direction ends."""
        return []


class FlipByte(Tamper):
    """Flip bits of one byte of an element: any framing byte, a length, a name, a footer.

    :param at: which byte of the element; negative counts from its end.
    """

    def __init__(self, where: Matcher, *, at: int, nth: int = 0, mask: int = 0x01) -> None:
        super().__init__(where, nth)
        self.at, self.mask = at, mask

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            self.strike(element)
            element.data[self.at] ^= self.mask
        return [element]


class FlipPageByte(Tamper):
    """Flip bits of one byte of one page's contents."""

    def __init__(
        self, nth: int = 0, *, phase: Phase | None = Phase.POSTCOPY, at: int = 0, mask: int = 0x01
    ) -> None:
        super().__init__(page(phase), nth)
        self.at, self.mask = at, mask

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            self.strike(element)
            element.data[element.head_bytes + self.at] ^= self.mask
        return [element]


class SwapPages(Tamper):
    """Exchange the contents of one page record and the next one that differs from it.

    Everything in between is held back meanwhile, so this needs a stream that goes on by itself (a
    background push). If no second page comes, nothing is damaged and ``hits`` stays 0.
    """

    def __init__(self, nth: int = 0, *, phase: Phase | None = Phase.POSTCOPY) -> None:
        super().__init__(page(phase), nth)
        self._held: list[Element] = []

    def see(self, element: Element) -> list[Element]:
        if self._held:
            self._held.append(element)
            first = self._held[0]
            if not self.where(element) or element.page == first.page:
                return []
            first.page, element.page = element.page, first.page
            self.strike(first)
            return self.finish()
        if self.is_due(element):
            self._held = [element]
            return []
        return [element]

    def finish(self) -> list[Element]:
        held, self._held = self._held, []
        return held


class ReplayStale(Tamper):
    """Send a page's earlier contents again where newer ones were due.

    Remembers every page sent in precopy, and strikes at the nth postcopy page whose contents have
    changed since. Needs a guest that dirties pages during precopy.
    """

    def __init__(self, nth: int = 0) -> None:
        self._old: dict[tuple[str, int], bytes] = {}
        super().__init__(self._has_changed, nth)

    def _has_changed(self, element: Element) -> bool:
        if element.kind is not Kind.PAGE or element.phase is not Phase.POSTCOPY:
            return False
        old = self._old.get((element.block, element.page_offset))
        return old is not None and old != element.page

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            self.strike(element)
            element.page = self._old[element.block, element.page_offset]
        elif element.phase is Phase.PRECOPY and element.kind in (Kind.PAGE, Kind.ZERO):
            contents = element.page if element.kind is Kind.PAGE else bytes(TARGET_PAGE_BYTES)
            self._old[element.block, element.page_offset] = contents
        return [element]


class DropPage(Tamper):
    """Leave out one whole host page; the stream around it stays well-formed.

    Records name their block only when it changes, so the record after a dropped one may have to
    name the block instead of it.

    :param host_page_bytes: all records of the same host page go, else its loader stumbles.
    """

    def __init__(
        self,
        nth: int = 0,
        *,
        phase: Phase | None = Phase.POSTCOPY,
        host_page_bytes: int = TARGET_PAGE_BYTES,
    ) -> None:
        super().__init__(
            lambda e: page(phase)(e) and e.page_offset % host_page_bytes == 0,
            nth,
        )
        self._host_page_bytes = host_page_bytes
        self._unnamed = False

    def _same_host_page(self, element: Element) -> bool:
        victim = self.victim
        return (
            victim is not None
            and element.phase is victim.phase
            and element.block == victim.block
            and element.page_offset // self._host_page_bytes
            == victim.page_offset // self._host_page_bytes
        )

    def see(self, element: Element) -> list[Element]:
        if element.kind not in (Kind.PAGE, Kind.ZERO):
            return [element]
        if self.is_due(element):
            self.strike(element)
        if self._same_host_page(element):
            self._unnamed = self._unnamed or not element.continues
            return []
        if self._unnamed:
            element.name_block()
            self._unnamed = False
        return [element]


class Watch(Tamper):
    """Do nothing but set ``struck`` when the element passes."""

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            self.strike(element)
        return [element]


class CutAt(Tamper):
    """End the connection inside or after an element.

    :param after: bytes of it that still get through; ``None``: all of it.
    """

    def __init__(self, where: Matcher, *, nth: int = 0, after: int | None = None) -> None:
        super().__init__(where, nth)
        self._after = after

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            raise Cut(self, element, self._after)
        return [element]


class CutAtByte(Tamper):
    """End the connection after exactly so many bytes of a direction.

    :param returns: count the return path's bytes instead of the main stream's.
    """

    def __init__(self, offset: int, *, returns: bool = False) -> None:
        super().__init__(
            lambda e: (e.phase is Phase.RETURN) is returns and e.offset + len(e.data) >= offset
        )
        self._offset = offset

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            raise Cut(self, element, self._offset - element.offset)
        return [element]


class StallAt(Tamper):
    """Hold a direction inside or after an element until :meth:`go_on`.

    ``struck`` tells that the stall is on: the moment to kill a process or to look at a state.

    :param after: bytes of it that get through before the stall; ``None``: all of it.
    """

    def __init__(self, where: Matcher, *, nth: int = 0, after: int | None = None) -> None:
        super().__init__(where, nth)
        self._after = after
        self.released = threading.Event()

    def go_on(self) -> None:
        """Let the stream flow again."""
        self.released.set()

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            raise Hold(self, element, self._after)
        return [element]
