"""``postcopy park``: a stream becomes a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from migration.runtime.channel import Channel
from migration.runtime.transport import Listener
from migration.wire.ram_setup import RamSetup
from uffd import punch_hole

from .keeper import Package
from .links import SourceLinks
from .manifest import Manifest, ParkError
from .partial import find_package, load_package
from .sections import OpaqueSection
from .serve import ViewBlock, ViewServer
from .sink import StreamSink
from .sink_ram import SinkBlock, SinkRam
from .store import ParkWriter

CLOSE_TIMEOUT_S = 5.0
"""How long a source that was told that all is well may take to close its connection."""


class FileKeeper:
    """Keeps a stream as a parked VM. The directory has its name before the source hears of it.

    :ivar manifest: once finished.
    """

    def __init__(
        self,
        writer: ParkWriter,
        *,
        peer: str,
        say: Callable[[str], None],
        view: ViewServer | None = None,
    ) -> None:
        """:param view: shows what has come to other tools; finished with this."""
        self._writer = writer
        self._peer = peer
        self._say = say
        self._view = view
        self.sink: StreamSink | None = None
        self.manifest: Manifest | None = None

    def blocks(self, setup: RamSetup) -> list[SinkBlock]:
        self._writer.add_blocks(setup)
        return self.sink_blocks()

    def sink_blocks(self) -> list[SinkBlock]:
        """Where pages go."""
        return [
            SinkBlock(block.idstr, block.used_length, block.page_size, 0, block.fd)
            for block in self._writer.blocks
        ]

    def ready(self, ram: SinkRam) -> None:
        """Pages may come: they may be looked at, too."""
        if self._view is None:
            return
        assert self.sink is not None

        def ask(index: int, offset: int, length: int) -> None:
            if ram.is_postcopy:
                ram.ask(index, offset, length)

        blocks = [
            ViewBlock(block.idstr, block.used_length, block.fd, received)
            for block, received in zip(self._writer.blocks, ram.received, strict=True)
        ]
        self._view.show(self.sink.configuration.machine, blocks, ask)
        ram.tell_arrivals(self._view.arrival_fd)

    def discarded(self, index: int, start: int, length: int) -> None:
        fd = self._writer.blocks[index].fd
        end = min(start + length, os.fstat(fd).st_size)
        if end > start:
            punch_hole(fd, start, end - start)

    def packaged(self, package: Package, accept: Callable[[], None]) -> None:
        """Its source will not start the guest again: what came must not be lost either."""
        self._writer.keep_package(package)
        self._say("the device state is on disk; the rest of RAM follows")
        accept()
        if self._view is not None:
            self._view.ask_again()

    def may_refuse(self) -> bool:
        return not self._writer.is_resumable

    def refusal(self) -> int | None:
        """Nothing is parked: the guest stays the source's, or waits there for us to go on."""
        return 1 if self.may_refuse() else None

    def finished(self, sections: list[OpaqueSection]) -> None:
        assert self.sink is not None
        self._stop_showing(complete=True)
        configuration = self.sink.configuration
        self.manifest = self._writer.finish(
            machine=configuration.machine,
            uuid=None if configuration.uuid is None else str(configuration.uuid),
            sections=sections,
            origin=self.sink.origin,
            peer=self._peer,
            description=self.sink.description,
            is_certain=not self.sink.has_return_path,
        )

    def told(self) -> None:
        """The source was told, if it listens: see whether it heard.

        :raises ParkError: it may not have.
        """
        assert self.sink is not None
        assert self.manifest is not None
        if not self.sink.has_return_path:
            return
        if not self.sink.was_heard(CLOSE_TIMEOUT_S):
            raise ParkError("the connection broke before it heard")
        self.manifest = self._writer.confirm(self.manifest)

    def close(self) -> None:
        """Close the files; what is on disk stays."""
        self._writer.close()

    def _stop_showing(self, *, complete: bool) -> None:
        if self._view is None:
            return
        if self.sink is not None and self.sink.ram is not None:
            self.sink.ram.tell_arrivals(-1)
        self._view.finish(complete=complete)

    def give_up(self) -> Path | None:
        """Nothing was parked: remove what was written. When a guest hangs on it keep it, and say
        where."""
        self._stop_showing(complete=False)
        stays = self.sink is not None and self.sink.is_refusal_certain
        if self._writer.is_resumable and not stays:
            self._writer.close()
            return self._writer.work
        self._writer.discard()
        return None


class TakingIn:
    """One stream on its way into a directory. :meth:`run` returns when the directory is there and
    the source was told; :meth:`stop` ends it early."""

    def __init__(
        self,
        channel: Channel,
        directory: Path,
        *,
        say: Callable[[str], None],
        listener: Listener | None = None,
        give_up_s: float | None = None,
        resume: bool = False,
        is_file: bool = False,
        view: ViewServer | None = None,
    ) -> None:
        """Takes over channel, listener and view.

        :param is_file: the channel is a snapshot file.
        :param view: where other tools may look at what has come (:mod:`.serve`); RAM is then kept
            in memory until it is whole.
        :param listener: where a preempt channel, or the source after a cut, may come in.
        :param give_up_s: how long a cut in postcopy is waited out; None: until :meth:`stop`.
        :param resume: another process was interrupted at this directory: go on with what it left
            (:mod:`.partial`).
        :raises ParkError: the directory cannot be made, or there is nothing to resume.
        """
        self.directory = directory
        self._package: Package | None = None
        links = SourceLinks(listener, give_up_s=give_up_s)
        try:
            in_memory = view is not None
            writer = (
                self._reopen(directory, in_memory=in_memory)
                if resume
                else ParkWriter(directory, in_memory=in_memory)
            )
        except BaseException:
            links.close()
            channel.close()
            if view is not None:
                view.finish(complete=False)
            raise
        self._keeper = FileKeeper(writer, peer=channel.peer, say=say, view=view)
        self._sink = StreamSink(channel, self._keeper, say=say, links=links, is_file=is_file)
        self._keeper.sink = self._sink

    def _reopen(self, directory: Path, *, in_memory: bool) -> ParkWriter:
        work = find_package(directory)
        self._package, blocks = load_package(work)
        return ParkWriter.reopen(directory, work, blocks, in_memory=in_memory)

    def run(self) -> Manifest:
        """On any error before the package the source is told SHUT 1 and nothing is left on disk;
        on any after it the partial directory stays, for ``resume``.

        :raises RemoteStreamError: bad bytes. :raises ParkError, MigrationError, OSError: the rest.
        """
        keeper = self._keeper
        try:
            if self._package is None:
                self._sink.run()
            else:
                self._sink.run_again(self._package, keeper.sink_blocks())
            keeper.told()
        except Exception as error:
            if keeper.manifest is not None:
                raise _unconfirmed(self.directory, error) from error
            left = keeper.give_up()
            if left is None:
                raise
            raise ParkError(_halfway(self.directory, left, error)) from error
        finally:
            self._sink.close()
            keeper.close()
        assert keeper.manifest is not None
        return keeper.manifest

    def stop(self) -> None:
        """Any thread: :meth:`run` ends soon, with an error unless it is done already."""
        self._sink.stop()


def _halfway(directory: Path, work: Path, error: Exception) -> str:
    return (
        f"{error}. Half of this guest is in {work}, half at its source, which waits: do not remove "
        f"either. Go on with: postcopy park --resume --listen URI {directory}; then, at the "
        "source: migrate -r URI. Only if the migration was cancelled there, and the guest goes on "
        f"there, remove {work}"
    )


def _unconfirmed(directory: Path, error: Exception) -> ParkError:
    """All is on disk, but the source may not know. It may have started its guest again."""
    return ParkError(
        f"{directory} is complete, but the source could not be told ({error}): it may run its "
        "guest again. If it does, remove the directory; if it does not, unpark with --force"
    )
