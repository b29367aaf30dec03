"""What the stages of one incoming migration work with."""

from __future__ import annotations

from dataclasses import dataclass

from ..channel import Channel
from ..machine import Machine
from ..options import IncomingOptions
from ..report import Report
from .channels import DestinationChannels
from .failure import DestinationFailure
from .guest import DestinationGuest
from .phase import DestinationPhase
from .ram import DestinationRam
from .sensitise import SensitiveRam


@dataclass(frozen=True, slots=True)
class DestinationParts:
    """Each part owns its state; a stage (commands, switchover, postcopy, resumption, end) has its
    own."""

    machine: Machine
    options: IncomingOptions
    report: Report
    ram: DestinationRam
    memory: SensitiveRam
    channels: DestinationChannels
    phase: DestinationPhase
    guest: DestinationGuest
    failure: DestinationFailure


def destination_parts(
    machine: Machine, channel: Channel, options: IncomingOptions, report: Report
) -> DestinationParts:
    """The parts of a migration that has not begun. :raises MemoryError: no room for them."""
    ram = DestinationRam(machine.ram, channel)
    channels = DestinationChannels(
        channel,
        ram.native,
        options,
        multifd_failed=lambda error: failure.multifd_failed(error),
        urgent_failed=lambda error: failure.stream_failed(error),
    )
    phase = DestinationPhase(report, lambda text: channels.main.explain(text))
    guest = DestinationGuest(machine, report, start_paused=options.start_paused)
    memory = SensitiveRam(machine, ram)
    failure = DestinationFailure(machine, channels, phase, guest, memory, report)
    return DestinationParts(
        machine=machine,
        options=options,
        report=report,
        ram=ram,
        memory=memory,
        channels=channels,
        phase=phase,
        guest=guest,
        failure=failure,
    )
