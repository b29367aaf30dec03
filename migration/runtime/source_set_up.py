"""What a source says of itself at the start, and which RAM it need not send."""

from __future__ import annotations

from collections.abc import Sequence

from guestmem import RAMBlock
from migration.wire.extension import Feature
from migration.wire.headers import Configuration

from .channel import Channel
from .errors import MigrationError
from .handover import blocks_to_hand_over, require_channel
from .machine import Machine, uuid_of
from .options import OutgoingOptions
from .source_ram import SourceRam


def configuration(machine: Machine, options: OutgoingOptions) -> Configuration:
    """The configuration section: the caller's own, or the machine's name and what is compared."""
    if options.configuration is not None:
        return options.configuration
    capabilities = ("x-ignore-shared",) if options.ignore_shared else None
    vm_uuid = uuid_of(machine) if options.validate_uuid else None
    return Configuration(machine.machine_type, uuid=vm_uuid, capabilities=capabilities)


def leave_out(
    ram: SourceRam, machine: Machine, options: OutgoingOptions, channel: Channel, features: Feature
) -> Sequence[RAMBlock]:
    """RAM of which no page is sent: the destination has it, or is given it.

    :returns: blocks whose memory is handed over.
    :raises MigrationError: the destination cannot take memory over, or the channel carries none.
    """
    if options.ignore_shared:
        shared = [block for block in machine.ram if block.is_named_file]
        ram.leave_out(shared, has_addresses=True)
    if not options.handover:
        return ()
    handed = blocks_to_hand_over(machine.ram)
    require_channel(channel)
    if Feature.HANDOVER | Feature.SPLIT_RUN not in features:
        raise MigrationError(
            "the destination takes no memory over (a stock QEMU, or x-split-run is off); a "
            "stock QEMU goes on with RAM made of a named file: --mem-path FILE at both "
            "ends, and capability x-ignore-shared"
        )
    ram.leave_out(handed)
    return handed
