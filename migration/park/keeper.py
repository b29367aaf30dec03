"""What a :class:`~migration.park.sink.StreamSink` hands on, and to whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from migration.wire.extension import Feature
from migration.wire.headers import Configuration
from migration.wire.ram_setup import RamSetup

from .sections import OpaqueSection
from .sink_ram import SinkBlock, SinkRam


@dataclass(frozen=True, slots=True)
class Package:
    """Where a stream stands once the package has come: all that is needed to go on with it.

    :ivar ram_section_id: of the source's RAM section. :ivar features: extensions in force.
    """

    configuration: Configuration
    sections: tuple[OpaqueSection, ...]
    ram_section_id: int
    features: Feature


class Keeper(Protocol):
    """What becomes of the stream's contents. All calls come from the thread that runs the sink."""

    def blocks(self, setup: RamSetup) -> list[SinkBlock]:
        """The block list came; make room."""
        ...

    def ready(self, ram: SinkRam) -> None:
        """Pages may come from now on."""
        ...

    def discarded(self, index: int, start: int, length: int) -> None:
        """The source takes back pages: they read as zero until they come again."""
        ...

    def packaged(self, package: Package, accept: Callable[[], None]) -> None:
        """Device state is whole, and pages go on coming (postcopy). The source's last PINGs are
        answered when ``accept`` is called, now or later, from any thread."""
        ...

    def may_refuse(self) -> bool:
        """Any thread, at once: whether the source may still have its guest back."""
        ...

    def refusal(self) -> int | None:
        """Something went wrong: the value for SHUT. Non-zero gives the guest back to its source;
        None: say nothing, so that it waits there."""
        ...

    def finished(self, sections: list[OpaqueSection]) -> None:
        """Everything is here. After this returned the source is told that all is well. May be
        called again when it failed."""
        ...
