"""Machine versions: the newer machine acts on the wire like the older one, and what happens when it
does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from migration.wire.compat import (
    CompatProperty,
    CompatTable,
    MachineVersion,
    Property,
    UnknownMachineError,
    parse_number,
    parse_size,
    parse_switch,
)
from migration.wire.errors import RemoteStreamError
from migration.wire.vmstate import U8, U32, VMStateDescription
from tests.support.vmstate_objects import load, save


@dataclass
class Ring:
    """A device that grew: a log in 1.1, and a field that 1.1 retired."""

    device_type: ClassVar[str] = "ring"
    properties: ClassVar[dict[str, Property]] = {
        "x-log": Property("sends_log"),
        "x-old-mode": Property("sends_mode"),
        "queue-size": Property("queue_size", parse_number),
        "window": Property("window", parse_size),
    }
    head: int = 0
    mode: int = 0
    log: int = 0
    sends_log: bool = True
    sends_mode: bool = False
    queue_size: int = 256
    window: int = 0
    seen: list[str] = field(default_factory=list)


def _defaults(ring: Ring) -> None:
    ring.log = 1000


NEW_PROGRAM = VMStateDescription(
    name="ring",
    version_id=1,
    pre_load=_defaults,
    fields=(U8("head"), U8("mode", test=lambda ring, version: ring.sends_mode)),
    subsections=(
        VMStateDescription(
            name="ring/log",
            version_id=1,
            needed=lambda ring: ring.sends_log and ring.log != 1000,
            fields=(U32("log"),),
        ),
    ),
)
OLD_PROGRAM = VMStateDescription(name="ring", version_id=1, fields=(U8("head"), U8("mode")))

MACHINES = CompatTable(
    MachineVersion("toy-1.2"),
    MachineVersion("toy-1.1", CompatProperty("ring", "queue-size", "128")),
    MachineVersion(
        "toy-1.0",
        CompatProperty("ring", "x-log", "off"),
        CompatProperty("ring", "x-old-mode", "on"),
        CompatProperty("ring", "queue-size", "64"),
        CompatProperty("no-such-device", "anything", "1"),
    ),
)


def test_lists_accumulate_from_the_newest_down() -> None:
    assert MACHINES.newest == "toy-1.2"
    assert MACHINES.names == ("toy-1.2", "toy-1.1", "toy-1.0")
    assert MACHINES.properties_for("toy-1.2") == ()
    assert [each.value for each in MACHINES.properties_for("toy-1.1")] == ["128"]
    ring = Ring()
    MACHINES.apply("toy-1.0", [ring])
    assert (ring.queue_size, ring.sends_log, ring.sends_mode) == (64, False, True)


def test_newer_program_produces_the_older_stream() -> None:
    ring = Ring(head=1, mode=2, log=3)
    MACHINES.apply("toy-1.0", [ring])
    payload = save(NEW_PROGRAM, ring)
    assert payload.hex() == "0102"
    assert load(OLD_PROGRAM, Ring(), payload).mode == 2


def test_older_stream_loads_into_the_newer_program_with_defaults() -> None:
    ring = Ring()
    MACHINES.apply("toy-1.0", [ring])
    load(NEW_PROGRAM, ring, save(OLD_PROGRAM, Ring(head=1, mode=2)))
    assert (ring.head, ring.mode, ring.log) == (1, 2, 1000)


def test_newer_stream_fails_on_the_older_program_naming_what_it_lacks() -> None:
    older = VMStateDescription(name="ring", version_id=1, fields=(U8("head"),))
    payload = save(NEW_PROGRAM, Ring(head=1, log=3))
    with pytest.raises(RemoteStreamError, match="unknown subsection 'ring/log' of 'ring'"):
        load(older, Ring(), payload)
    assert load(older, Ring(), save(NEW_PROGRAM, Ring(head=1, log=1000))).head == 1


def test_users_own_settings_come_last() -> None:
    ring = Ring()
    overrides = [CompatProperty.parse("ring.queue-size=0x20"), CompatProperty.parse("disk.x=1")]
    unused = MACHINES.apply("toy-1.0", [ring], overrides)
    assert ring.queue_size == 32
    assert [each.device for each in unused] == ["disk"]


@pytest.mark.parametrize("text", ["ring.queue-size", "queue-size=1", ".x=1", "ring.=1", "=1"])
def test_malformed_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not device\.property=value"):
        CompatProperty.parse(text)


def test_unknown_property_is_an_error_unless_optional() -> None:
    table = CompatTable(MachineVersion("m", CompatProperty("ring", "x-gone", "on")))
    with pytest.raises(ValueError, match="ring has no property 'x-gone'"):
        table.apply("m", [Ring()])
    lenient = CompatProperty("ring", "x-gone", "on", optional=True)
    CompatTable(MachineVersion("m", lenient)).apply("m", [Ring()])


def test_wrong_value_names_device_and_property() -> None:
    table = CompatTable(MachineVersion("m", CompatProperty("ring", "x-log", "maybe")))
    with pytest.raises(ValueError, match=r"ring\.x-log: 'maybe' is neither on nor off"):
        table.apply("m", [Ring()])


def test_unknown_machine_lists_those_there_are() -> None:
    with pytest.raises(
        UnknownMachineError, match=r"'toy-9'; there are toy-1\.2, toy-1\.1"
    ) as caught:
        MACHINES.properties_for("toy-9")
    assert caught.value.known == MACHINES.names
    with pytest.raises(ValueError, match="different names"):
        CompatTable(MachineVersion("a"), MachineVersion("a"))


def test_values_as_users_write_them() -> None:
    assert [parse_switch(text) for text in ("on", "Yes", "off", "n")] == [True, True, False, False]
    assert [parse_number(text) for text in ("12", "0x10", "-3")] == [12, 16, -3]
    assert [parse_size(text) for text in ("12", "1K", "2m", "0x1B", "1G")] == [
        *(12, 1024, 2 << 20, 0x1B, 1 << 30),
    ]
    for text in ("", "K", "-1", "1Q"):
        with pytest.raises(ValueError, match=r"."):
            parse_size(text)
