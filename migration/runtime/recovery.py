"""Going on after the channel of a postcopy broke.

    source                                  destination
    RECV_BITMAP(name), for every block  ->
                                        <-  RECV_BITMAP + what has come, for each
    (what has not come is dirty again)
    (between our own ends:) RUN         ->  (starts the guest, had the first one been lost)
    POSTCOPY_RESUME                     ->
                                        <-  RESUME_ACK, then every request that is still open
    pages as before

The new channel begins with the first command: no header, no configuration; section ids are those of
the first channel. Between our own ends it is checksummed from the first byte if the first one was.

Source: QEMU ``docs/devel/migration/postcopy.rst`` ("Postcopy Recovery").
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from guestmem import Bitmap, RAMList
from migration.wire import headers
from migration.wire.commands import (
    Ping,
    PostcopyResume,
    PostcopyRun,
    RecvBitmap,
    command_name,
    read_command,
    write_command,
)
from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.return_path import (
    Pong,
    RecvBitmapReply,
    ResumeAck,
    ReturnPathMessage,
    read_received_bitmap,
    write_received_bitmap,
    write_rp,
)

from .channel import Channel, ChannelWriter
from .errors import MigrationError

ANSWER_TIMEOUT_S = 30.0


def answer_source(channel: Channel, received: dict[str, Bitmap]) -> bool:
    """The destination's part, up to and including POSTCOPY_RESUME; RESUME_ACK is the caller's.

    :returns: RUN came once more.
    :raises RemoteStreamError: something else than a recovery. :raises MigrationError: it broke
        again.
    """
    writer = ChannelWriter(channel)
    run_came = False
    while True:
        at = channel.position
        kind = headers.read_section_type(channel)
        if kind is not SectionType.COMMAND:
            raise RemoteStreamError(f"a {kind.name} section begins no recovery", offset=at)
        match command := read_command(channel):
            case RecvBitmap(idstr):
                if idstr not in received:
                    raise RemoteStreamError(f"unknown RAM block {idstr!r}", offset=at)
                bitmap = received[idstr]
                write_rp(writer, RecvBitmapReply(idstr))
                write_received_bitmap(writer, bitmap.to_bytes(), bitmap.nbits)
            case Ping(value):
                write_rp(writer, Pong(value))
            case PostcopyRun():
                run_came = True
            case PostcopyResume():
                return run_came
            case _:
                raise RemoteStreamError(f"command {command_name(command)} in a recovery", offset=at)
        channel.flush()


def acknowledge(channel: Channel) -> None:
    """RESUME_ACK: pages may come again."""
    write_rp(ChannelWriter(channel), ResumeAck())
    channel.flush()


def _trimmed(data: bytes, page_count: int) -> Bitmap:
    """The wire's bitmap, whole 64-bit words, cut to the block: what is behind means nothing."""
    kept = bytearray(data[: -(-page_count // 8)])
    if page_count % 8:
        kept[-1] &= (1 << page_count % 8) - 1
    return Bitmap.from_bytes(bytes(kept), page_count)


class SourceRecovery:
    """The source's part. The return-path thread hands it the messages that the native loop
    leaves."""

    def __init__(self, channel: Channel, ram: RAMList, dirty: dict[str, Bitmap]) -> None:
        self._channel = channel
        self._ram = ram
        self._dirty = dirty
        self._lock = threading.Condition()
        self._answered: dict[str, Bitmap] = {}
        self._is_acknowledged = False
        self._error: Exception | None = None

    def take_message(self, message: ReturnPathMessage, at: int) -> None:
        """Return-path thread: what came, and where it began in the channel.

        :raises RemoteStreamError: not one for now.
        """
        match message:
            case RecvBitmapReply(idstr) if idstr in self._dirty:
                page_count = self._dirty[idstr].nbits
                data = read_received_bitmap(self._channel, page_count)
                with self._lock:
                    self._answered[idstr] = _trimmed(data, page_count)
                    self._lock.notify_all()
            case ResumeAck():
                with self._lock:
                    self._is_acknowledged = True
                    self._lock.notify_all()
            case _:
                raise RemoteStreamError(
                    f"{message} in a recovery", offset=at, section="return path"
                )

    def fail(self, error: Exception) -> None:
        """Return-path thread: nothing more will come."""
        with self._lock:
            self._error = error
            self._lock.notify_all()

    def learn_received(self) -> dict[str, Bitmap]:
        """Ask what has come, for every block; the answers by name.

        :raises MigrationError: no answer, or the channel broke.
        """
        for block in self._ram:
            write_command(ChannelWriter(self._channel), RecvBitmap(block.idstr))
        self._channel.flush()
        self._wait(lambda: len(self._answered) == len(self._ram), "its received bitmaps")
        return self._answered

    def resume(self, *, run_again: bool) -> None:
        """POSTCOPY_RESUME, and wait until the destination is ready.

        :param run_again: say RUN before: the first one may have been lost with the connection.
        """
        if run_again:
            write_command(ChannelWriter(self._channel), PostcopyRun())
        write_command(ChannelWriter(self._channel), PostcopyResume())
        self._channel.flush()
        self._wait(lambda: self._is_acknowledged, "RESUME_ACK")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        with self._lock:
            self._lock.wait_for(lambda: done() or self._error is not None, ANSWER_TIMEOUT_S)
            if self._error is not None:
                raise self._error
            if not done():
                raise MigrationError(
                    f"the destination did not send {what} in {ANSWER_TIMEOUT_S:g} s"
                )
