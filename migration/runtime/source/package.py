"""The package: all device state in one piece, which its destination loads while pages come."""

from __future__ import annotations

from migration.wire.commands import Packaged, Ping, PostcopyListen, PostcopyRun, write_command
from migration.wire.io import BytesWriter
from migration.wire.registry import StateRegistry

PING_PACKAGE, PING_AFTER_PACKAGE = 3, 4


def packaged_state(registry: StateRegistry, ram_section_id: int | None, *, with_run: bool) -> bytes:
    """LISTEN, every device, a PING that is answered when all is loaded; then a PING on the stream.

    :param ram_section_id: of a relay's source, behind which devices count up; None: ours.
    :param with_run: RUN is the last command in it, as a stock destination needs it.
    """
    package = BytesWriter()
    write_command(package, PostcopyListen())
    first_id = None if ram_section_id is None else ram_section_id + 1
    registry.save_full_sections(package, first_id, describe=False)
    write_command(package, Ping(PING_PACKAGE))
    if with_run:
        write_command(package, PostcopyRun())
    blob = package.getvalue()
    stream = BytesWriter()
    write_command(stream, Packaged(len(blob)))
    stream.write(blob)
    write_command(stream, Ping(PING_AFTER_PACKAGE))
    return stream.getvalue()
