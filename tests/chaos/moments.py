"""Where in a phase a fault can strike: elements of the stream, so that it is the phase that is hit
and not a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.support.stream_elements import Element, Kind
from tests.support.stream_elements import Phase as Part
from tests.support.tamper import Hold, Matcher, StallAt, command, kind, message, page

from .plan import Phase, Plan

_PACKAGE_PONG = 3


@dataclass(frozen=True)
class Moment:
    """One place.

    :ivar name: for people.
    :ivar where: makes a matcher; called once per run, since some remember what they saw.
    :ivar after: bytes of the element that get through before; ``None``: all, -1: half of it.
    :ivar spread: how many matches of it are candidates.
    """

    name: str
    where: Callable[[], Matcher]
    after: int | None = 0
    spread: int = 1


def _at(name: str, where: Matcher, after: int | None = 0, spread: int = 1) -> Moment:
    return Moment(name, lambda: where, after, spread)


def pong(value: int) -> Matcher:
    """The answer to the PING of that value."""
    return lambda e: e.name == "PONG" and e.data[-4:] == value.to_bytes(4, "big")


def ping(value: int) -> Matcher:
    """The PING of that value."""
    return lambda e: e.name == "PING" and e.data[-4:] == value.to_bytes(4, "big")


def _since(first: Matcher, then: Matcher) -> Callable[[], Matcher]:
    """What ``then`` matches once ``first`` has passed."""

    def make() -> Matcher:
        seen = False

        def match(element: Element) -> bool:
            nonlocal seen
            seen = seen or first(element)
            return seen and then(element)

        return match

    return make


def _device(part: Part) -> Matcher:
    return lambda e: e.kind is Kind.SECTION and e.phase is part and e.name != "ram"


#: A background page of a guest that runs at the destination.
page_after_run = _since(command("RUN"), page(Part.POSTCOPY))
_SETUP = (
    _at("the header", kind(Kind.HEADER)),
    _at("OPEN_RETURN_PATH", command("OPEN_RETURN_PATH")),
    _at("a PING", command("PING"), 0, 2),
    _at("a PONG", message("PONG"), 0, 2),
    _at("half the block list", kind(Kind.RECORD, Part.SETUP), -1),
    _at("the set-up's footer", kind(Kind.FOOTER, Part.SETUP)),
)
_ADVISE = (_at("ADVISE", command("ADVISE")), _at("ADVISE has come", command("ADVISE"), None))
_ACTIVE = (
    _at("a page", page(Part.PRECOPY), 0, 300),
    _at("half a page", page(Part.PRECOPY), -1, 300),
    _at("a section", kind(Kind.SECTION, Part.PRECOPY), 0, 3),
    _at("a footer", kind(Kind.FOOTER, Part.PRECOPY), 0, 3),
)
_DEVICE = (
    _at("DISCARD", command("DISCARD")),
    _at("DISCARD has come", command("DISCARD"), None),
    _at("the package", command("PACKAGED")),
    _at("inside the package", command("PACKAGED"), None),
    _at("a device", kind(Kind.SECTION, Part.PACKAGE), 0, 3),
    _at("half a device", kind(Kind.OPAQUE, Part.PACKAGE), -1, 3),
    _at("LISTEN", command("LISTEN")),
    _at("a device's request", lambda e: e.name == "REQ_PAGES_ID"),
    _at("a page before RUN", page(Part.POSTCOPY)),
)
_DEVICE_PRECOPY = (
    _at("a device", _device(Part.PRECOPY), 0, 3),
    Moment("half a device", _since(_device(Part.PRECOPY), kind(Kind.OPAQUE)), -1),
    _at("the last PING", ping(_PACKAGE_PONG)),
)
_ACKNOWLEDGED = (
    _at("the acknowledgement is on its way", pong(_PACKAGE_PONG)),
    _at("the acknowledgement has come", pong(_PACKAGE_PONG), None),
)
_RUN = (
    _at("RUN is on its way", command("RUN")),
    _at("half of RUN has come", command("RUN"), 2),
)
_RUN_PRECOPY = (_at("the end is on its way", kind(Kind.END)),)
_POSTCOPY = (
    _at("RUN has come", command("RUN"), None),
    Moment("a page", page_after_run, 0, 200),
    Moment("half a page", page_after_run, -1, 200),
    Moment("a footer", _since(command("RUN"), kind(Kind.FOOTER)), 0, 3),
    Moment("a request", _since(command("RUN"), lambda e: e.name.startswith("REQ_PAGES")), 0, 10),
)
_END = (
    _at("the end is on its way", kind(Kind.END)),
    _at("the end has come", kind(Kind.END), None),
    _at("SHUT is on its way", message("SHUT")),
)
_RECOVERY = (
    _at("RECV_BITMAP", command("RECV_BITMAP")),
    _at("RECV_BITMAP has come", command("RECV_BITMAP"), None),
    _at("the answer", message("RECV_BITMAP")),
    _at("half a bitmap", lambda e: e.kind is Kind.OPAQUE and e.name == "RECV_BITMAP", -1),
    _at("RESUME", command("RESUME")),
    _at("RESUME_ACK", message("RESUME_ACK")),
    _at("RESUME_ACK has come", message("RESUME_ACK"), None),
    Moment("a page after it", _since(message("RESUME_ACK"), page(Part.POSTCOPY)), 0, 3),
)


def moments(phase: Phase, *, is_postcopy: bool) -> Sequence[Moment]:
    """All places of a phase."""
    match phase:
        case Phase.SETUP:
            return (*_SETUP, *_ADVISE) if is_postcopy else _SETUP
        case Phase.ACTIVE:
            return _ACTIVE
        case Phase.DEVICE:
            return _DEVICE if is_postcopy else _DEVICE_PRECOPY
        case Phase.ACKNOWLEDGED:
            return (*_ACKNOWLEDGED, *(_RUN if is_postcopy else _RUN_PRECOPY))
        case Phase.POSTCOPY:
            return _POSTCOPY
        case Phase.END:
            return _END
        case Phase.RECOVERY:
            return _RECOVERY
        case _:
            return ()


#: Bytes whose damage shows without a checksum: kind -> (index, bits).
_TELLTALE: dict[Kind, tuple[int, int]] = {
    Kind.HEADER: (0, 0x01),
    Kind.SECTION: (0, 0x40),
    Kind.COMMAND: (1, 0x40),
    Kind.FOOTER: (0, 0x01),
    Kind.PAGE: (6, 0x08),
    Kind.END: (0, 0x40),
    Kind.RETURN: (0, 0x40),
}


@dataclass
class Damage:
    """What a flip does to an element.

    :ivar detail: decides the byte and the bit where any is as good.
    """

    detail: int
    has_checksums: bool
    only_page: bool
    done: str = field(default="", init=False)

    def do(self, element: Element) -> None:
        """Flip one bit, or the telltale ones."""
        if self.only_page:
            index = element.head_bytes + self.detail % (len(element.data) - element.head_bytes)
            mask = 1 << self.detail % 8
        elif self.has_checksums and element.frames and self.detail % 3 == 0:
            at, header = element.frames[0]
            damaged = bytearray(header)
            damaged[self.detail % len(header)] ^= 1 << self.detail % 8
            element.frames[0] = (at, bytes(damaged))
            self.done = f"byte {self.detail % len(header)} of a frame's header"
            return
        elif self.has_checksums:
            index, mask = self.detail % len(element.data), 1 << self.detail % 8
        else:
            index, mask = _TELLTALE[element.kind]
        element.data[index] ^= mask
        self.done = f"bits {mask:#x} of byte {index} of {element.kind.value} {element.name}"


class Striker(StallAt):
    """Stops the stream at the moment, so that the fault hits just there; or does the damage."""

    def __init__(self, moment: Moment, nth: int, damage: Damage | None) -> None:
        super().__init__(moment.where(), nth=nth % moment.spread, after=moment.after)
        self.moment = moment
        self.damage = damage

    def see(self, element: Element) -> list[Element]:
        if not self.is_due(element):
            return [element]
        if self.damage is not None:
            self.damage.do(element)
            self.strike(element)
            return [element]
        after = len(element.data) // 2 if self._after == -1 else self._after
        raise Hold(self, element, after)


def striker(plan: Plan, *, flips_page: bool, flips_framing: bool) -> Striker:
    """The plan's, ready to be put into a proxy."""
    candidates = list(moments(plan.phase, is_postcopy=plan.is_postcopy))
    damage = None
    if flips_page or flips_framing:
        # Before the handshake is over nothing has a checksum.
        has_checksums = plan.checksums and plan.phase is not Phase.SETUP
        damage = Damage(plan.strike, has_checksums, flips_page)
        candidates = [moment for moment in candidates if _can_be_damaged(moment, flips_page)]
    return Striker(candidates[plan.moment % len(candidates)], plan.nth, damage)


def _can_be_damaged(moment: Moment, flips_page: bool) -> bool:
    if flips_page:
        return "page" in moment.name
    return not any(word in moment.name for word in ("half a device", "bitmap", "block list"))
