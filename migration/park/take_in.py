"""``postcopy park``: a stream becomes a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from migration.runtime.channel import Channel
from migration.runtime.transport import Listener
from migration.wire.ram_setup import RamSetup
from uffd import punch_hole

from .links import SourceLinks
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


class TakingIn:
    """One stream on its way into a directory. :meth:`run` returns when the directory is there and
    the source was told; :meth:`stop` ends it early."""

    def __init__(
        self,
        channel: Channel,
        directory: Path,
        *,
        warn: Callable[[str], None],
        listener: Listener | None = None,
        give_up_s: float | None = None,
    ) -> None:
        """Takes over channel and listener.

        :param listener: where a preempt channel, or the source after a cut, may come in.
        :param give_up_s: how long a cut in postcopy is waited out; None: until :meth:`stop`.
        :raises ParkError: the directory cannot be made.
        """
        self.directory = directory
        links = SourceLinks(listener, give_up_s=give_up_s)
        try:
            self._keeper = FileKeeper(directory, peer=channel.peer)
        except BaseException:
            links.close()
            channel.close()
            raise
        self._sink = StreamSink(channel, self._keeper, warn=warn, links=links)
        self._keeper.sink = self._sink

    def run(self) -> Manifest:
        """On any error the source is told SHUT 1 and nothing is left on disk.

        :raises RemoteStreamError: bad bytes. :raises ParkError, MigrationError, OSError: the rest.
        """
        keeper = self._keeper
        try:
            self._sink.run()
        except Exception as error:
            if keeper.manifest is None:
                raise
            _unconfirmed(self.directory, keeper.manifest, error)
        finally:
            self._sink.close()
            if keeper.manifest is None:
                keeper.discard()
        assert keeper.manifest is not None
        return keeper.manifest

    def stop(self) -> None:
        """Any thread: :meth:`run` ends soon, with an error unless it is done already."""
        self._sink.stop()


def _unconfirmed(directory: Path, manifest: Manifest, error: Exception) -> None:
    """All is on disk, but the source was not told. It may have started its guest again."""
    change_state(directory, manifest, ParkedState.UNCONFIRMED, "the source could not be told")
    raise ParkError(
        f"{directory} is complete, but the source could not be told ({error}): it may run its "
        "guest again. If it does, remove the directory; if it does not, unpark with --force"
    ) from error
