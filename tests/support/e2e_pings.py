"""A PING between any two sections: what a chatty source does, on a stream without checksums."""

from __future__ import annotations

import struct

from tests.support.stream_elements import Element, Kind, Phase
from tests.support.tamper import Tamper, kind

_COMMAND, _PING = 8, 2
FIRST_VALUE = 1000


class InsertPings(Tamper):
    """After every RAM section of the postcopy phase; ``hits`` counts them, from
    :data:`FIRST_VALUE` up."""

    def __init__(self) -> None:
        super().__init__(kind(Kind.FOOTER, Phase.POSTCOPY))

    def see(self, element: Element) -> list[Element]:
        if not self.where(element):
            return [element]
        value = FIRST_VALUE + self.hits
        self.strike(element)
        data = struct.pack(">BHHI", _COMMAND, _PING, 4, value)
        ping = Element(Kind.COMMAND, Phase.POSTCOPY, element.offset, bytearray(data), name="PING")
        return [element, ping]
