"""Events that wait for the description trailer.

A device section is cut out by its footer, its bytes are held, and the events after it queue up
behind it. The description then checks every cut by the length it states, corrects a wrong one, and
names the fields. Without a description the bytes are released raw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.headers import write_footer, write_section_header
from migration.wire.io import BytesWriter

from .cut import cut_by_description
from .description import Described, Description
from .devices import decode_section
from .events import Event, SectionEvent

EVENTS_MAX = 100_000
"""A device section sent before RAM would hold back all of RAM's events; past this it goes out
raw.
"""


class HeldEvents:
    """A queue of events that starts with a device section whose layout is not known yet.

    :param bytes_max: bytes of device data that may be held.
    """

    def __init__(self, bytes_max: int) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0
        self._bytes_max = bytes_max

    def put(self, event: Event) -> Iterator[Event]:
        """Queue ``event``, or give back what can go out now.

        :raises RemoteStreamError: more device data than may be held.
        """
        waits = isinstance(event, SectionEvent) and event.payload is not None
        if waits and isinstance(event, SectionEvent) and event.in_package:
            # In a package no description will ever come, unless an earlier section waits already.
            waits = False
            if not self._events:
                decode_section(event, None)
        if not waits and not self._events:
            yield event
            return
        self._hold(event)
        if len(self._events) > EVENTS_MAX:
            yield from self.release(None)

    def release(self, description: Description | None) -> Iterator[Event]:
        """All events in order, device sections decoded as far as ``description`` allows.

        :raises RemoteStreamError: a section has another length than described, or other content.
            The events in front of it were given out; the rest stays.
        """
        while self._events:
            event = self._events[0]
            if isinstance(event, SectionEvent) and event.payload is not None:
                described = None
                if description is not None and not event.in_package:
                    described = description.take(event.header.idstr, event.header.instance_id)
                    if described is not None and described.length != len(event.payload):
                        event = self._recut(described, description)
                self._bytes -= len(event.payload or b"")
                decode_section(event, described)
            self._events.popleft()
            yield event

    def _hold(self, event: Event) -> None:
        if isinstance(event, SectionEvent) and event.payload is not None:
            self._bytes += len(event.payload)
            if self._bytes > self._bytes_max:
                raise RemoteStreamError(
                    f"more than {self._bytes_max} bytes of device data to hold (see --hold)",
                    offset=event.offset,
                    section=event.header.idstr,
                )
        self._events.append(event)

    def _recut(self, described: Described, description: Description) -> SectionEvent:
        """The footer search was taken in by a payload that looks like a section border. Put the
        neighbours together again and cut them by the description.
        """
        group = self._take_group()
        first = group[0]
        data = b"".join(_rebuild(event) for event in group)
        devices = [described, *description.devices]
        try:
            cuts = cut_by_description(data, devices, has_footers=first.has_footer)
        except RemoteStreamError:
            self._events.extendleft(reversed(group))
            raise RemoteStreamError(
                f"{len(first.payload or b'')} bytes, the description says {described.length}",
                offset=first.offset,
                section=first.header.idstr,
            ) from None
        events = [
            replace(
                first,
                header=cut.header,
                offset=first.offset + cut.start,
                length=cut.end - cut.start,
                payload=cut.payload,
                payload_offset=first.offset + cut.payload_start,
            )
            for cut in cuts
        ]
        self._bytes += sum(len(cut.payload) for cut in cuts)
        self._bytes -= sum(len(event.payload or b"") for event in group)
        self._events.extendleft(reversed(events))
        return events[0]

    def _take_group(self) -> list[SectionEvent]:
        group: list[SectionEvent] = []
        while self._events:
            event = self._events[0]
            if not isinstance(event, SectionEvent) or event.header.type is not SectionType.FULL:
                break
            group.append(event)
            self._events.popleft()
        return group


def _rebuild(event: SectionEvent) -> bytes:
    writer = BytesWriter()
    write_section_header(writer, event.header)
    writer.write(event.payload or b"")
    if event.has_footer:
        write_footer(writer, event.header.section_id)
    return writer.getvalue()
