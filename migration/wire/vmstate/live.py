"""State too big to be sent while the guest stands still: it is sent in rounds while the guest runs.

One START section, any number of PART sections, one END section; RAM and block disks work this way.
A handler owns the payload only; headers and footers are written by whoever drives it
(``registry.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..io import Reader, Writer


@dataclass(frozen=True, slots=True)
class PendingEstimate:
    """What a handler still has to send.

    :ivar precopy_bytes: must be sent before the guest runs on the destination.
    :ivar postcopy_bytes: may follow afterwards, if postcopy is used.
    """

    precopy_bytes: int = 0
    postcopy_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.precopy_bytes + self.postcopy_bytes

    def __add__(self, other: PendingEstimate) -> PendingEstimate:
        return PendingEstimate(
            self.precopy_bytes + other.precopy_bytes, self.postcopy_bytes + other.postcopy_bytes
        )


@runtime_checkable
class LiveStateHandler(Protocol):
    """One thing with live state, e.g. ``ram`` or a disk.

    Source, in this order: ``is_active``, ``save_setup``, then ``pending`` and ``save_iterate``
    alternating while the guest runs, ``save_complete`` once it stands still, ``save_cleanup`` in
    every case. Destination: ``load_setup`` before the first ``load``, one ``load`` per section,
    ``load_cleanup`` in every case.

    All are called by the migration thread (source) or by the thread reading the stream
    (destination), never two at a time; whatever the guest's own threads change meanwhile is the
    handler's to lock. A method fails the migration by raising.

    :ivar idstr: section name, 1 to 255 bytes.
    :ivar instance_id: tells apart handlers of one name.
    :ivar version_id: version written; ``load`` is never given a newer one.
    :ivar minimum_version_id: oldest version ``load`` understands.
    """

    @property
    def idstr(self) -> str: ...

    @property
    def instance_id(self) -> int: ...

    @property
    def version_id(self) -> int: ...

    @property
    def minimum_version_id(self) -> int: ...

    @property
    def has_postcopy(self) -> bool:
        """Part of the state may follow after the guest runs on the destination. Then
        ``save_complete`` is not called at the switchover but after it; a handler without this is
        complete before the discards."""
        ...

    def is_active(self) -> bool:
        """Takes part in this migration at all."""
        ...

    def save_setup(self, writer: Writer) -> None:
        """Write the START payload: sizes, names, whatever the receiver must know first. The guest
        runs.
        """
        ...

    def save_iterate(self, writer: Writer, budget_bytes: int) -> bool:
        """Write one PART payload and return whether nothing is left for this round.

        :param budget_bytes: stop soon after this many payload bytes; the payload must be complete
            and well-formed all the same. 0 means: the least that still makes progress.
        """
        ...

    def pending(self, *, exact: bool) -> PendingEstimate:
        """What is left.

        :param exact: collect fresh dirtiness first (expensive; asked when an estimate was small
            enough to stop the guest), otherwise guess cheaply.
        """
        ...

    def save_complete(self, writer: Writer) -> None:
        """Write the END payload: everything left. The guest stands still (or runs elsewhere, in
        postcopy).
        """
        ...

    def save_cleanup(self) -> None:
        """Give up what ``save_setup`` took. Also after errors, also when ``save_setup`` itself
        failed.
        """
        ...

    def load_setup(self) -> None:
        """Get ready for the first ``load``."""
        ...

    def load(self, reader: Reader, version_id: int) -> None:
        """Read one START, PART or END payload; it must say itself where it ends.

        :raises RemoteStreamError: anything about it is unacceptable.
        """
        ...

    def load_cleanup(self) -> None:
        """Give up what ``load_setup`` took."""
        ...
