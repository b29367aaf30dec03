"""What the stages of one outgoing migration work with."""

from __future__ import annotations

from dataclasses import dataclass

from guestmem import DirtyTracker
from migration.native import lib

from ..channel import Channel
from ..machine import Machine
from ..options import OutgoingOptions
from ..report import Report
from .answers import SourceAnswers
from .channels import SourceChannels
from .commit import CommitPoint
from .control import SourceControl
from .guest import SourceGuest
from .ram import SourceRam
from .throttle import Throttler

RAM_SECTION_ID = 0x10000  # devices count up from 0; ids mean nothing across machines


@dataclass(frozen=True, slots=True)
class SourceParts:
    """Each part owns its state; a stage (set-up, precopy, postcopy, resumption) has its own.

    :ivar ram_section_id: of the RAM section, whose id the stream repeats.
    """

    machine: Machine
    options: OutgoingOptions
    report: Report
    tracker: DirtyTracker
    ram: SourceRam
    ram_section_id: int
    channels: SourceChannels
    control: SourceControl
    answers: SourceAnswers
    guest: SourceGuest
    commit: CommitPoint
    throttler: Throttler


def source_parts(
    machine: Machine, channel: Channel, options: OutgoingOptions, report: Report
) -> SourceParts:
    """The parts of a migration that has not begun. :raises MemoryError: no room for them."""
    tracker = machine.dirty_tracker()
    ram = SourceRam(machine.ram, channel, tracker)
    given_id = options.ram_section_id
    ram_section_id = RAM_SECTION_ID if given_id is None else given_id
    lib.src_set_ram_section(ram.native, ram_section_id)
    channels = SourceChannels(channel, ram.native, options)
    control = SourceControl()
    placement = options.placement
    answers = SourceAnswers(ram, control, placement.fault_cpus if placement is not None else ())
    guest = SourceGuest(machine, report)
    return SourceParts(
        machine=machine,
        options=options,
        report=report,
        tracker=tracker,
        ram=ram,
        ram_section_id=ram_section_id,
        channels=channels,
        control=control,
        answers=answers,
        guest=guest,
        commit=CommitPoint(machine, guest, ram, channels, answers, control, report),
        throttler=Throttler(machine.hold),
    )
