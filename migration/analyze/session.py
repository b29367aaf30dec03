"""All channels of one migration together: which file is what, in which order, and one result.

main        starts with QEVM (at offset 0, or behind something: ``file:PATH,offset=N``)
recovery    a main channel postcopy recovery opened: no header, starts with commands
multifd     starts with the multifd magic; read in step with the main channel
preempt     bare RAM records
return-path messages from the destination
empty       a channel that stayed silent
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from migration.wire.constants import (
    FILE_MAGIC,
    FILE_VERSION,
    MULTIFD_MAGIC,
    RAM_FLAGS_MASK,
    CommandNumber,
    RamFlag,
    ReturnPathType,
    SectionType,
)
from migration.wire.errors import RemoteStreamError, TruncatedStreamError

from .events import (
    ChannelEvent,
    CutEvent,
    EndEvent,
    ErrorEvent,
    Event,
    MultifdEvent,
    PreemptEvent,
    RamBlockEvent,
)
from .multifd import MultifdChannel
from .preempt import read_preempt
from .ram import ImageFactory, RamCollector
from .returnpath import read_return_path
from .source import Source
from .state import HELD_BYTES_MAX, ChannelError, MigrationState
from .stream import MainStream

_PREFIX_BYTES_MAX = 16 << 20
"""How far into a file the stream may start."""

_HEAD = FILE_MAGIC.to_bytes(4, "big") + FILE_VERSION.to_bytes(4, "big")


class Role(Enum):
    """What a file is."""

    MAIN = "main"
    RECOVERY = "recovery"
    MULTIFD = "multifd"
    PREEMPT = "preempt"
    RETURN_PATH = "return-path"
    EMPTY = "empty"
    UNKNOWN = "unknown"


class RoleError(Exception):
    """The files are not the channels of one migration, or one is nothing known."""


class Session:
    """One migration in one or more files.

    :param sources: freshly opened, in the order in which their channels were opened.
    :param return_paths: files known to be the other direction.
    :param image_for: see :class:`~migration.analyze.ram.RamCollector`.
    :raises RoleError: a file is nothing known, or there are two main channels.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        return_paths: Sequence[Source] = (),
        *,
        image_for: ImageFactory | None = None,
        with_map: bool = False,
        held_bytes_max: int = HELD_BYTES_MAX,
    ) -> None:
        self.state = MigrationState(ram=RamCollector(image_for), held_bytes_max=held_bytes_max)
        self._with_map = with_map
        self._is_one_file = len(sources) + len(return_paths) == 1
        roles = [(source, find_role(source)) for source in sources]
        self._by_role = {
            role: [source for source, found in roles if found is role] for role in Role
        }
        self._by_role[Role.RETURN_PATH] += return_paths
        self._by_role[Role.MAIN] += self._strangers()
        mains = self._by_role[Role.MAIN]
        if len(mains) > 1:
            raise RoleError(
                f"{mains[0].name} and {mains[1].name} both start a migration; "
                "give one migration at a time, or compare with --diff"
            )
        if len(mains) + len(self._by_role[Role.RECOVERY]) == 0 and (
            self._by_role[Role.MULTIFD] or self._by_role[Role.PREEMPT]
        ):
            raise RoleError("the main channel is missing: it starts with the bytes QEVM")
        self._file: str | None = None

    def _strangers(self) -> list[Source]:
        """What is no known channel is read as the main channel when there is none, so that its
        first bytes get an error with a place; beside a main channel it is a mistake.
        """
        if self._by_role[Role.MAIN] or self._by_role[Role.RECOVERY]:
            if unknown := self._by_role[Role.UNKNOWN]:
                name = unknown[0].name
                raise RoleError(f"{name} is not a migration stream, nor a channel of one")
            return []
        if self._by_role[Role.UNKNOWN]:
            return self._by_role[Role.UNKNOWN]
        if any(self._by_role[role] for role in Role if role is not Role.EMPTY):
            return []
        return self._by_role[Role.EMPTY][:1]

    def events(self) -> Iterator[Event]:
        """Everything, in stream order; the last event is an EndEvent or an ErrorEvent.

        :raises OSError: a file cannot be read, or an image not be written.
        """
        end: EndEvent | None = None
        error: ErrorEvent | None = None
        try:
            for event in self._channels():
                if isinstance(event, EndEvent):
                    end = event
                else:
                    yield event
        except ChannelError as failure:
            error = self._error(failure.error, failure.file)
        except RemoteStreamError as failure:
            error = self._error(failure, self._file)
        for block in self.state.ram.map:
            yield RamBlockEvent(block, self._with_map)
        yield error or end or EndEvent(0)

    def _channels(self) -> Iterator[Event]:
        state = self.state
        for source in self._by_role[Role.MULTIFD]:
            yield from self._open(source, Role.MULTIFD)
            channel = MultifdChannel(source, state.ram)
            channel.read_greeting()
            state.multifd.append(channel)
        yield from self._main_channels()
        for channel in state.multifd:
            self._file = channel.source.name
            channel.run_to_end()
            yield MultifdEvent(channel.source.name, channel.channel, channel.summary())
        for source in self._by_role[Role.PREEMPT]:
            yield from self._open(source, Role.PREEMPT)
            yield from self._preempt(source)
        for source in self._by_role[Role.EMPTY]:
            if source in self._by_role[Role.MAIN]:
                continue
            yield from self._open(source, Role.EMPTY)
        for source in self._by_role[Role.RETURN_PATH]:
            yield from self._open(source, Role.RETURN_PATH)
            yield from self._return_path(source)

    def _main_channels(self) -> Iterator[Event]:
        recoveries = self._by_role[Role.RECOVERY]
        mains = [*self._by_role[Role.MAIN], *recoveries]
        for index, source in enumerate(mains):
            is_resumed = source in recoveries
            yield from self._open(source, Role.RECOVERY if is_resumed else Role.MAIN)
            if source.starts_with_frame():
                source.start_frames()
            stream = MainStream(source, self.state, is_resumed=is_resumed)
            try:
                yield from stream.run()
            except TruncatedStreamError as cut:
                if index + 1 == len(mains):
                    raise
                yield CutEvent(cut.offset, cut.section or self.state.section, cut.reason)

    def _preempt(self, source: Source) -> Iterator[Event]:
        counts: dict[str, object] = {}
        try:
            read_preempt(source, self.state.ram, counts)
        except TruncatedStreamError as cut:
            if not self._by_role[Role.RECOVERY]:
                raise
            yield CutEvent(cut.offset, cut.section, cut.reason)
        yield PreemptEvent(source.name, counts)

    def _return_path(self, source: Source) -> Iterator[Event]:
        try:
            yield from read_return_path(source)
        except TruncatedStreamError as cut:
            if not self._by_role[Role.RECOVERY]:
                raise
            yield CutEvent(cut.offset, cut.section, cut.reason)

    def _open(self, source: Source, role: Role) -> Iterator[Event]:
        self._file = source.name
        if not self._is_one_file:
            yield ChannelEvent(source.name, role.value)

    def _error(self, error: RemoteStreamError, file: str | None) -> ErrorEvent:
        section = error.section or self.state.section
        if self.state.section and self.state.section.endswith(f"/{section}"):
            section = self.state.section  # the codec does not know it is inside a package
        message = error.reason
        if not self._is_one_file and file is not None:
            message = f"{file}: {message}"
        return ErrorEvent(error.offset, section, message, self.state.last_good)


def find_role(source: Source) -> Role:
    """Tell from its first bytes what a file is, and skip what is in front of an embedded stream."""
    head = source.peek(64)
    word = int.from_bytes(head[:8], "big")
    if not head:
        return Role.EMPTY
    if head.startswith(_HEAD[:4]):
        return Role.MAIN
    if word >> 32 == MULTIFD_MAGIC:
        return Role.MULTIFD
    if _starts_recovery(head):
        return Role.RECOVERY
    if len(head) >= 4 and _is_message(head):
        return Role.RETURN_PATH
    if source.starts_with_frame():
        return Role.RECOVERY
    if len(head) >= 8 and _is_record(word, head[8:]):
        return Role.PREEMPT
    at = source.peek(_PREFIX_BYTES_MAX).find(_HEAD)
    if at < 0:
        return Role.UNKNOWN
    source.skip(at)
    return Role.MAIN


def _starts_recovery(head: bytes) -> bool:
    if head[0] != SectionType.COMMAND or len(head) < 3:
        return False
    return int.from_bytes(head[1:3], "big") in (
        CommandNumber.RECV_BITMAP,
        CommandNumber.POSTCOPY_RESUME,
        CommandNumber.PING,
        CommandNumber.OPEN_RETURN_PATH,
    )


def _is_message(head: bytes) -> bool:
    kind, length = int.from_bytes(head[:2], "big"), int.from_bytes(head[2:4], "big")
    fixed = {
        ReturnPathType.SHUT: 4,
        ReturnPathType.PONG: 4,
        ReturnPathType.REQ_PAGES: 12,
        ReturnPathType.RESUME_ACK: 4,
        ReturnPathType.SWITCHOVER_ACK: 0,
    }
    if kind in (ReturnPathType.REQ_PAGES_ID, ReturnPathType.RECV_BITMAP):
        name_at = 16 if kind == ReturnPathType.REQ_PAGES_ID else 4
        return len(head) > name_at and length == name_at - 3 + head[name_at]
    return kind in fixed and fixed[ReturnPathType(kind)] == length


def _is_record(word: int, rest: bytes) -> bool:
    flags = word & RAM_FLAGS_MASK
    if word == RamFlag.EOS:
        return True
    return flags in (RamFlag.PAGE, RamFlag.ZERO) and rest[:1] > b"\0"
