"""What the user decides about one migration; the service makes it from capabilities and
parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from migration.engine.policy import PushPolicy, QemuPolicy, SwitchoverPolicy
from migration.wire.extension import Feature
from migration.wire.headers import Configuration

from .affinity import Placement
from .channel import Channel
from .transport import Listener


@dataclass(frozen=True, slots=True)
class OutgoingOptions:
    """What the user decides; the parameters are read again in every round, so they can be changed.

    :ivar postcopy: capability ``postcopy-ram``.
    :ivar return_path: capability ``return-path`` (implied by postcopy).
    :ivar features: extensions offered to a destination of our own kind.
    :ivar parameter: looks a parameter up by QEMU's name.
    :ivar policy: decides when to switch over.
    :ivar push_policy: says what is pushed first in postcopy; None: the scan alone decides.
    :ivar configuration: what the header says, when it is more than the machine's type.
    :ivar connect_urgent: capability ``postcopy-preempt``: opens the second channel.
    :ivar connect_multifd: capability ``multifd``: opens one of its channels.
    :ivar multifd_channels: how many.
    :ivar multifd_each_section: all of them meet at each EOS, and zero pages stay on the main
        channel, as up to QEMU 8.0.
    :ivar urgent_first: open it before the first byte and end it with an EOS, as a QEMU of 7.2
        expects.
    :ivar pause_first, release, auto_converge, xbzrle: QEMU's capabilities of that name.
    :ivar handover: parameter ``mode`` is ``cpr-transfer``: RAM made of memfds changes hands.
    :ivar ignore_shared: capability ``x-ignore-shared``: the destination has RAM made of named files
        itself.
    :ivar switchover_ack: capability ``switchover-ack``: a running guest is not stopped before the
        destination allows it.
    :ivar validate_uuid: capability ``validate-uuid``: the header names the VM's UUID.
    :ivar zero_page_detection: parameter ``zero-page-detection``.
    :ivar placement: processors for the return-path and the migration thread; None: any.
    :ivar before_giving: called once, right before the guest may start to run at the destination.
    :ivar ram_section_id: a relay gives its source's, so that the two ends can go on without it;
        devices then count up behind it.
    """

    postcopy: bool
    return_path: bool
    features: Feature
    parameter: Callable[[str], int]
    policy: SwitchoverPolicy = field(default_factory=QemuPolicy)
    push_policy: PushPolicy | None = None
    configuration: Configuration | None = None
    before_giving: Callable[[], None] | None = None
    connect_urgent: Callable[[], Channel] | None = None
    connect_multifd: Callable[[], Channel] | None = None
    multifd_channels: int = 0
    multifd_each_section: bool = False
    urgent_first: bool = False
    pause_first: bool = False
    release: bool = False
    auto_converge: bool = False
    xbzrle: bool = False
    handover: bool = False
    ignore_shared: bool = False
    switchover_ack: bool = False
    validate_uuid: bool = False
    zero_page_detection: str = "multifd"
    placement: Placement | None = None
    ram_section_id: int | None = None


@dataclass(frozen=True, slots=True)
class IncomingOptions:
    """What the user decides.

    :ivar postcopy: capability ``postcopy-ram``: an ADVISE without it is refused.
    :ivar features: extensions offered to a source of our own kind.
    :ivar start_paused: QEMU's ``-S``: the guest waits for ``cont``.
    :ivar in_flight_bytes: see :meth:`Channel.bound_in_flight`.
    :ivar blocktime: capability ``postcopy-blocktime``.
    :ivar collapse: parameter ``x-collapse``: huge pages of small ones after END.
    :ivar fault_cpus: processors for the threads that a waiting vCPU depends on; none: any.
    :ivar ignore_shared: capability ``x-ignore-shared``: RAM made of named files is the source's.
    :ivar switchover_ack: capability ``switchover-ack``: tell the source that it may switch over.
    :ivar memory_guard: refuse at ADVISE what this host has no memory for.
    :ivar multifd: the channels of capability ``multifd``, behind their greetings; ours to close.
    :ivar listener: where the preempt channel comes from; None: capability ``postcopy-preempt`` is
        off.
    """

    postcopy: bool
    features: Feature
    start_paused: bool
    in_flight_bytes: int
    listener: Listener | None = None
    blocktime: bool = False
    collapse: bool = False
    ignore_shared: bool = False
    switchover_ack: bool = False
    memory_guard: bool = True
    fault_cpus: tuple[int, ...] = ()
    multifd: tuple[Channel, ...] = ()
