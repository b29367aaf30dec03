"""``postcopy park``: a stream becomes a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from migration.runtime.channel import Channel
from migration.wire.ram_setup import RamSetup
from uffd import punch_hole

from .manifest import Manifest, ParkedState, ParkError, change_state
from .sections import OpaqueSection
from .sink import SinkBlock, StreamSink
from .store import ParkWriter


class FileKeeper:
    """Keeps a stream as a parked VM. The directory has its name before the source hears of it.

    :ivar manifest: once finished.
    """

    def __init__(self, directory: Path, *, peer: str) -> None:
        self._writer = ParkWriter(directory)
        self._peer = peer
        self.sink: StreamSink | None = None
        self.manifest: Manifest | None = None

    def blocks(self, setup: RamSetup) -> list[SinkBlock]:
        self._writer.add_blocks(setup)
        return [
            SinkBlock(block.idstr, block.used_length, block.page_size, 0, block.fd)
            for block in self._writer.blocks
        ]

    def discarded(self, index: int, start: int, length: int) -> None:
        fd = self._writer.blocks[index].fd
        end = min(start + length, os.fstat(fd).st_size)
        if end > start:
            punch_hole(fd, start, end - start)

    def packaged(self, sections: list[OpaqueSection], accept: Callable[[], None]) -> None:
        """Nothing to do before the pages are here."""
        accept()

    def refusal(self) -> int:
        """Nothing is parked: the guest stays the source's."""
        return 1

    def finished(self, sections: list[OpaqueSection]) -> None:
        assert self.sink is not None
        configuration = self.sink.configuration
        self.manifest = self._writer.finish(
            machine=configuration.machine,
            uuid=None if configuration.uuid is None else str(configuration.uuid),
            sections=sections,
            origin="postcopy" if self.sink.is_postcopy else "precopy",
            peer=self._peer,
        )

    def discard(self) -> None:
        """Nothing was parked: remove what was written."""
        self._writer.discard()


def take_in(channel: Channel, directory: Path, *, warn: Callable[[str], None]) -> Manifest:
    """Take one stream in; returns when the directory is there and the source was told.

    Closes the channel. On any error the source is told SHUT 1 and nothing is left on disk.

    :raises RemoteStreamError: bad bytes. :raises ParkError, MigrationError, OSError: the rest.
    """
    keeper = FileKeeper(directory, peer=channel.peer)
    sink = StreamSink(channel, keeper, warn=warn)
    keeper.sink = sink
    try:
        sink.run()
    except Exception as error:
        if keeper.manifest is None:
            raise
        _unconfirmed(directory, keeper.manifest, error)
    finally:
        sink.close()
        if keeper.manifest is None:
            keeper.discard()
    assert keeper.manifest is not None
    return keeper.manifest


def _unconfirmed(directory: Path, manifest: Manifest, error: Exception) -> None:
    """All is on disk, but the source was not told. It may have started its guest again."""
    change_state(directory, manifest, ParkedState.UNCONFIRMED, "the source could not be told")
    raise ParkError(
        f"{directory} is complete, but the source could not be told ({error}): it may run its guest "
        "again. If it does, remove the directory; if it does not, unpark with --force"
    ) from error
