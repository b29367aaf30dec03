"""A preempt channel: bare RAM records, no header, no sections.

Its CONTINUE refers to its own records. QEMU 7.2 closes it with an EOS; later ones just close it.
Source: QEMU ``migration/ram.c`` (``postcopy_preempt_new_channel``), ``migration/postcopy-ram.c``.
"""

from __future__ import annotations

from migration.wire.constants import RamFlag
from migration.wire.errors import RemoteStreamError

from .ram import RamChannel, RamCollector, iter_ram_records
from .source import Source


def read_preempt(source: Source, ram: RamCollector, counts: dict[str, object]) -> None:
    """Read the whole channel.

    :param counts: filled in as records come, so that they are right up to an error.
    :raises RemoteStreamError: what is there is no legal record, or something follows the EOS.
    """
    source.section = "preempt channel"
    if source.starts_with_frame():
        source.start_frames()
    channel = RamChannel(ram.map)
    normal = zero = 0
    counts.update(normal=0, zero=0)
    for record in iter_ram_records(source, channel, want_data=ram.wants_data, may_end=True):
        ram.take(record)
        if record.kind is RamFlag.ZERO:
            zero += 1
        elif record.block is not None:
            normal += 1
        counts.update(normal=normal, zero=zero)
    if not source.at_end():
        raise RemoteStreamError(
            "more bytes after the channel's end mark",
            offset=source.position,
            section=source.section,
        )
