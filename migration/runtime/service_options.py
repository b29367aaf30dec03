"""What the user set, turned into what one migration is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from migration.engine.policy import QemuPolicy
from migration.engine.settings import Value
from migration.wire.extension import Feature

from .channel import Channel
from .errors import MigrationError
from .machine import Machine
from .options import IncomingOptions, OutgoingOptions
from .policies import as_push, as_switchover
from .settings import Settings
from .transport import Listener, is_multi_channel

ONE_CHANNEL = "Migration requires multi-channel URIs (e.g. tcp): capability multifd is on"


def outgoing_options(
    settings: Settings, uri: str, channel: Channel, connect: Callable[[], Channel]
) -> OutgoingOptions:
    """For a migration over ``channel``.

    :param settings: as they are now; only what the migration looks up may be changed while it runs.
    :param connect: opens a further channel to the same place.
    :raises MigrationError: a combination that this transport or an old peer does not have.
    """
    capabilities, parameters = settings.capabilities, settings.parameters
    preempt, multifd = capabilities["postcopy-preempt"], capabilities["multifd"]
    if preempt and not is_multi_channel(uri):
        raise MigrationError(f"{uri} does not support multi-channels, which preempt needs")
    urgent_first = preempt and bool(parameters["x-preempt-pre-7-2"])
    if multifd and urgent_first:
        raise MigrationError("multifd and x-preempt-pre-7-2: a QEMU that old has no such pair")
    is_handover = parameters["mode"] == "cpr-transfer"
    return OutgoingOptions(
        postcopy=capabilities["postcopy-ram"],
        connect_urgent=connect if preempt else None,
        connect_multifd=connect if multifd else None,
        multifd_channels=int(parameters["multifd-channels"]),
        multifd_each_section=bool(parameters["x-multifd-flush-after-each-section"]),
        zero_page_detection=str(parameters["zero-page-detection"]),
        pause_first=capabilities["pause-before-switchover"],
        release=capabilities["release-ram"],
        auto_converge=capabilities["auto-converge"],
        xbzrle=capabilities["xbzrle"],
        ignore_shared=capabilities["x-ignore-shared"],
        switchover_ack=capabilities["switchover-ack"],
        validate_uuid=capabilities["validate-uuid"],
        handover=is_handover,
        urgent_first=urgent_first,
        # A command that does not answer must not be sent what a file cannot hold either.
        return_path=capabilities["return-path"] and channel.is_two_way and not channel.may_be_deaf,
        features=_features(parameters) | (Feature.HANDOVER if is_handover else Feature(0)),
        parameter=settings.number,
        placement=settings.placement(),
        policy=as_switchover(settings.policy) or QemuPolicy(),
        push_policy=as_push(settings.policy),
    )


def incoming_options(
    settings: Settings,
    machine: Machine,
    channel: Channel,
    listener: Listener | None,
    multifd: tuple[Channel, ...],
) -> IncomingOptions:
    """For a migration that came over ``channel``.

    :param listener: where the preempt channel will come from, if one may.
    :param multifd: multifd's channels, in their order.
    """
    capabilities, parameters = settings.capabilities, settings.parameters
    placement = settings.placement()
    return IncomingOptions(
        listener=listener,
        multifd=multifd,
        blocktime=capabilities["postcopy-blocktime"],
        collapse=bool(parameters["x-collapse"]),
        postcopy=capabilities["postcopy-ram"],
        ignore_shared=capabilities["x-ignore-shared"],
        switchover_ack=capabilities["switchover-ack"],
        features=_features(parameters) | _could_take_over(machine, channel),
        start_paused=settings.start_paused,
        memory_guard=bool(parameters["x-memory-guard"]),
        in_flight_bytes=int(parameters["x-postcopy-sndbuf"]),
        fault_cpus=placement.fault_cpus if placement is not None else (),
    )


def _features(parameters: Mapping[str, Value]) -> Feature:
    features = Feature.COUNTED
    if parameters["x-checksum"]:
        features |= Feature.CHECKSUM
    if parameters["x-split-run"]:
        features |= Feature.SPLIT_RUN
    if parameters["x-sparse"]:
        features |= Feature.SPARSE
    return features


def _could_take_over(machine: Machine, channel: Channel) -> Feature:
    """Memory, should the source want to give it."""
    has_blocks = any(block.can_be_handed_over for block in machine.ram)
    return Feature.HANDOVER if has_blocks and channel.carries_descriptors else Feature(0)
