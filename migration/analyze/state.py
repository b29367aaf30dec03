"""What the channels of one migration share while they are taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from guestmem.geometry import TARGET_PAGE_BYTES, is_power_of_two
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import Feature
from migration.wire.headers import Configuration, SectionHeader

from .multifd import MultifdChannel
from .ram import RamCollector

HELD_BYTES_MAX = 256 << 20
"""Device data held back until its end or its description is known."""

_TARGET_PAGE_BYTES_MIN = 1 << 9
_TARGET_PAGE_BYTES_MAX = 1 << 16


class ChannelError(Exception):
    """A companion channel is damaged. Names the file, which an offset alone would not."""

    def __init__(self, file: str, error: RemoteStreamError) -> None:
        super().__init__(f"{file}: {error}")
        self.file = file
        self.error = error


@dataclass(slots=True)
class MigrationState:
    """One migration as read so far.

    :ivar started: live sections by id; ids of the first main channel stay valid after a recovery.
    :ivar has_footers: None until the first section ended.
    :ivar syncs_at_flush: multifd channels meet the main channel at MULTIFD_FLUSH records (QEMU 8.1
        and later); before, at every end of a RAM section.
    :ivar features: our own extension's features the source chose.
    :ivar last_good: the last thing read whole, for the error line.
    :ivar section: what is being read now, for errors that do not know it.
    """

    ram: RamCollector = field(default_factory=RamCollector)
    started: dict[int, SectionHeader] = field(default_factory=dict)
    configuration: Configuration | None = None
    page_sizes_summary: int = 0
    target_page_bytes: int = TARGET_PAGE_BYTES
    has_footers: bool | None = None
    multifd: list[MultifdChannel] = field(default_factory=list)
    syncs_at_flush: bool = False
    features: Feature = field(default_factory=lambda: Feature(0))
    last_good: dict[str, object] | None = None
    section: str | None = None
    held_bytes_max: int = HELD_BYTES_MAX

    def has_capability(self, name: str) -> bool:
        """The configuration announced this validated capability."""
        return self.configuration is not None and name in (self.configuration.capabilities or ())

    def set_target_page_bytes(self, value: int, offset: int) -> None:
        """Take over what the stream says about the target page.

        :raises RemoteStreamError: no page size.
        """
        if not is_power_of_two(value) or not (
            _TARGET_PAGE_BYTES_MIN <= value <= _TARGET_PAGE_BYTES_MAX
        ):
            raise RemoteStreamError(f"target page of {value:#x} bytes", offset=offset)
        self.target_page_bytes = value

    def sync_multifd(self) -> None:
        """Bring every multifd channel to its next SYNC: what it brought so far is older than what
        the main channel says next.

        :raises ChannelError: a channel is damaged.
        """
        for channel in self.multifd:
            try:
                channel.run_to_sync()
            except RemoteStreamError as error:
                raise ChannelError(channel.source.name, error) from None
