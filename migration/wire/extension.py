"""What two of our own ends add to QEMU's stream, and how they find out about each other.

Nothing here can disturb a stock QEMU: until the peer has proved to be ours, only legal PINGs are
sent, and a QEMU answers each with a PONG of the same value.

    source                       stock QEMU     our destination
    PING HELLO                   PONG HELLO     PONG HELLO, PONG HELLO_OURS
    PING 1                       PONG 1         PONG 1
    -- only if HELLO_OURS arrived (it does so before PONG 1) --
    PING OFFER | bits                           PONG OFFER | bits, PONG ACCEPT | subset
    PING CHOSEN | bits
      (last plain byte to the destination)
    chosen features in force ->                 PONG CHOSEN | bits
                                                  (last plain byte to the source)
                                                <- chosen features in force

So each direction switches at a byte both ends know. A destination that finds a HELLO must go on
answering plain PINGs: a source of ours may decide to stay plain by choosing no bits.

With :attr:`Feature.CHECKSUM` in force everything from that byte on, in that direction, travels in
frames:

    be32 payload length (1..131072) | be32 CRC32C | payload

where the CRC32C (Castagnoli, as iSCSI) is taken over the be64 sequence number of the frame (from 0
for each direction of each connection), the be32 length, and the payload. A lost, repeated,
reordered or damaged frame is thus found; the concatenated payloads are the plain stream. The frame
codec itself is part of the data plane in C.
"""

from __future__ import annotations

from enum import Enum, IntFlag
from typing import Final

from .commands import Ping
from .errors import RemoteStreamError
from .return_path import Pong

HELLO: Final = 0x50430001
HELLO_OURS: Final = 0x50430002
OFFER: Final = 0x50440000
ACCEPT: Final = 0x50450000
CHOSEN: Final = 0x50460000
FEATURE_MASK: Final = 0x0000FFFF

FIRST_PLAIN_PING: Final = 1
"""The ordinary PING after HELLO. Its PONG means: what HELLO had to bring has arrived."""

PING_SET_UP: Final = 5
"""Behind the set-up. With :attr:`Feature.HANDOVER` descriptors follow its PONG."""

FRAME_PAYLOAD_MAX: Final = 131072
FRAME_HEADER_BYTES: Final = 8


class Feature(IntFlag):
    """What can be switched on between two of our own ends."""

    CHECKSUM = 1 << 0
    """Frames with CRC32C, in both directions."""
    SPLIT_RUN = 1 << 1
    """POSTCOPY_RUN travels alone after the package is acknowledged, not inside the package."""
    COUNTED = 1 << 2
    """The destination counts pages at the end, so those never populated are sent too, as zero."""
    SPARSE = 1 << 3
    """Pages never written at the source are told of by their ranges (X_RAM_ZERO) and not sent."""
    HANDOVER = 1 << 8
    """RAM made of memfds is not sent: their descriptors are, over the unix socket."""


KNOWN_FEATURES: Final = (
    Feature.CHECKSUM | Feature.SPLIT_RUN | Feature.COUNTED | Feature.SPARSE | Feature.HANDOVER
)


class SourcePhase(Enum):
    """How far the source is."""

    IDLE = "idle"
    HELLO_SENT = "hello-sent"
    OFFERED = "offered"
    CHOSEN = "chosen"
    """CHOSEN is sent: features are in force towards the destination, not yet from it."""
    IN_FORCE = "in-force"
    STOCK = "stock"
    """The peer is not ours; the stream stays QEMU's own."""


class SourceHandshake:
    """The source's half, pure: feed it pongs, send the pings it returns, in order.

    :ivar phase: see :class:`SourcePhase`.
    :ivar chosen: the features agreed on; meaningful from phase CHOSEN on.
    """

    def __init__(self, offered: Feature = KNOWN_FEATURES, *, wanted: Feature | None = None) -> None:
        self._offered = offered
        self._wanted = offered if wanted is None else wanted
        self._ours = False
        self.phase = SourcePhase.IDLE
        self.chosen = Feature(0)

    def start(self) -> tuple[Ping, ...]:
        """Right after OPEN_RETURN_PATH."""
        self.phase = SourcePhase.HELLO_SENT
        return Ping(HELLO), Ping(FIRST_PLAIN_PING)

    @property
    def is_settled(self) -> bool:
        """Nothing more will be sent or is waited for."""
        return self.phase in (SourcePhase.STOCK, SourcePhase.IN_FORCE)

    def on_pong(self, value: int, *, offset: int) -> tuple[Ping, ...]:
        """Take one PONG; values that are not the handshake's have no effect.

        When the result is a CHOSEN ping, the features are in force towards the destination from the
        byte after it. When
        :attr:`phase` turns IN_FORCE, they are in force on the return path from the byte after this
            PONG.

        :param offset: position of the PONG on the return path, for the error.
        :raises RemoteStreamError: the peer accepted features that were not offered, or confirms
            what was not chosen.
        """
        if self.phase is SourcePhase.HELLO_SENT:
            return self._on_hello(value)
        if self.phase is SourcePhase.OFFERED and value & ~FEATURE_MASK == ACCEPT:
            return self._on_accept(value & FEATURE_MASK, offset)
        if self.phase is SourcePhase.CHOSEN and value & ~FEATURE_MASK == CHOSEN:
            if value & FEATURE_MASK != self.chosen:
                raise _bad(f"features {value & FEATURE_MASK:#x} confirmed, not chosen", offset)
            self.phase = SourcePhase.IN_FORCE
        return ()

    def _on_hello(self, value: int) -> tuple[Ping, ...]:
        if value == HELLO_OURS:
            self._ours = True
        if value != FIRST_PLAIN_PING:
            return ()
        if not self._ours:
            self.phase = SourcePhase.STOCK
            return ()
        self.phase = SourcePhase.OFFERED
        return (Ping(OFFER | self._offered),)

    def _on_accept(self, accepted: int, offset: int) -> tuple[Ping, ...]:
        if accepted & ~self._offered:
            raise _bad(f"features {accepted:#x} accepted, {int(self._offered):#x} offered", offset)
        self.chosen = Feature(accepted) & self._wanted
        self.phase = SourcePhase.CHOSEN
        return (Ping(CHOSEN | self.chosen),)


class DestinationHandshake:
    """The destination's half, pure: feed it every PING before LISTEN, send the pongs it returns, in
    order.

    :ivar is_in_force: CHOSEN was received: features are in force from the source from the byte
        after that PING, and towards the source from the byte after its PONG.
    :ivar chosen: the features agreed on.
    """

    def __init__(self, supported: Feature = KNOWN_FEATURES) -> None:
        self._supported = supported
        self._greeted = False
        self._accepted: Feature | None = None
        self.is_in_force = False
        self.chosen = Feature(0)

    def on_ping(self, value: int, *, offset: int) -> tuple[Pong, ...]:
        """Take one PING. Every PING is answered by its own value; the handshake's own may get a
        second PONG.

        Without a HELLO before, all values are ordinary pings, as for a stock QEMU.

        :param offset: position of the PING on the stream, for the error.
        :raises RemoteStreamError: the source chose features that were not accepted, or chose twice.
        """
        echo = Pong(value)
        if value == HELLO:
            self._greeted = True
            return echo, Pong(HELLO_OURS)
        family, bits = value & ~FEATURE_MASK, value & FEATURE_MASK
        if family == OFFER and self._greeted and not self.is_in_force:
            self._accepted = Feature(bits & self._supported)
            return echo, Pong(ACCEPT | self._accepted)
        if family == CHOSEN and self._accepted is not None:
            if self.is_in_force or bits & ~self._accepted:
                raise _bad(f"features {bits:#x} chosen, {int(self._accepted):#x} accepted", offset)
            self.chosen = Feature(bits)
            self.is_in_force = True
        return (echo,)


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset, section="handshake")
