"""Machine versions: how a newer program behaves, on the wire, like an older one.

Each machine version lists the properties that must be set on devices so that they act as they did
then. A machine of some version gets the lists of all versions from the newest down to its own; of
two that set the same property, the older one wins because it comes later. Devices turn the
property into a condition: a subsection's ``needed``, a field's ``test``.

    MACHINES = CompatTable(
        MachineVersion("toy-1.1"),
        MachineVersion("toy-1.0", CompatProperty("toy-ring", "x-log", "off")),
    )
    MACHINES.apply("toy-1.0", [ring, disk])     # ring.send_log is False now

Source: QEMU ``docs/devel/migration/compatibility.rst``, ``hw/core/machine.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Parse = Callable[[str], Any]

_TRUE = frozenset({"on", "yes", "true", "y"})
_FALSE = frozenset({"off", "no", "false", "n"})
_SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def parse_switch(text: str) -> bool:
    """``on``, ``yes``, ``true``, ``y`` or their opposites.

    :raises ValueError: anything else.
    """
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither on nor off")


def parse_number(text: str) -> int:
    """A decimal, 0x or 0o number; raises ValueError for anything else."""
    return int(text, 0)


def parse_size(text: str) -> int:
    """A number of bytes with an optional suffix B, K, M, G, T, P or E (powers of 1024).

    :raises ValueError: anything else, or negative.
    """
    shift = _SUFFIXES.get(text[-1:].upper())
    is_hex = text.lower().startswith("0x")
    value = int(text, 0) if shift is None or is_hex else int(text[:-1], 0) << shift
    if value < 0:
        raise ValueError(f"size {text!r} is negative")
    return value


@dataclass(frozen=True, slots=True)
class Property:
    """A switchable trait of a device.

    :ivar attribute: attribute of the device that holds it.
    :ivar parse: text to value; raises ValueError.
    """

    attribute: str
    parse: Parse = parse_switch


class ConfigurableDevice(Protocol):
    """What a device needs for properties to be set on it."""

    @property
    def device_type(self) -> str:
        """Name used in compat lists and ``-global``."""
        ...

    @property
    def properties(self) -> Mapping[str, Property]:
        """Properties by name, names as users write them (``x-log``)."""
        ...


@dataclass(frozen=True, slots=True)
class CompatProperty:
    """Set ``property`` to ``value`` on every device of type ``device``.

    :ivar optional: a device without that property is passed over instead of being an error.
    """

    device: str
    property: str
    value: str
    optional: bool = False

    @classmethod
    def parse(cls, text: str) -> CompatProperty:
        """From ``device.property=value``, as ``-global`` takes it.

        :raises ValueError: not of that form.
        """
        target, equals, value = text.partition("=")
        device, dot, name = target.rpartition(".")
        if not (equals and dot and device and name):
            raise ValueError(f"{text!r} is not device.property=value")
        return cls(device, name, value)


class MachineVersion:
    """One machine type.

    :param name: on the wire, e.g. ``toy-1.0``.
    :param properties: what devices of this **and every older** version need that the next newer
        one does not.
    """

    def __init__(self, name: str, *properties: CompatProperty) -> None:
        self.name = name
        self.properties = properties


class UnknownMachineError(ValueError):
    """No such machine type.

    :ivar known: those there are, newest first.
    """

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown machine type {name!r}; there are {', '.join(known)}")
        self.known = known


class CompatTable:
    """The versions of one family of machines, newest first."""

    def __init__(self, *versions: MachineVersion) -> None:
        names = [version.name for version in versions]
        if not versions or len(set(names)) != len(names):
            raise ValueError("machine versions need different names")
        self._versions = versions

    @property
    def names(self) -> tuple[str, ...]:
        """Machine types, newest first."""
        return tuple(version.name for version in self._versions)

    @property
    def newest(self) -> str:
        """The one to use when nothing is said."""
        return self._versions[0].name

    def properties_for(self, machine_type: str) -> tuple[CompatProperty, ...]:
        """All that applies to ``machine_type``, in the order in which it is applied.

        :raises UnknownMachineError: it is not in the table.
        """
        collected: list[CompatProperty] = []
        for version in self._versions:
            collected += version.properties
            if version.name == machine_type:
                return tuple(collected)
        raise UnknownMachineError(machine_type, self.names)

    def apply(
        self,
        machine_type: str,
        devices: Iterable[ConfigurableDevice],
        overrides: Iterable[CompatProperty] = (),
    ) -> list[CompatProperty]:
        """Make ``devices`` act as those of ``machine_type``. To be called once, before they run
        or are loaded.

        :param overrides: the user's own (``-global``), applied last.
        :returns: overrides that met no device: most likely mistyped.
        :raises ValueError: a device has no such property, or does not take the value; nothing is
            undone.
        :raises UnknownMachineError: the machine type is not in the table.
        """
        everything = list(devices)
        for setting in self.properties_for(machine_type):
            apply_property(setting, everything)
        return [setting for setting in overrides if not apply_property(setting, everything)]


def apply_property(setting: CompatProperty, devices: Iterable[ConfigurableDevice]) -> bool:
    """Set one property on every device of its type; returns whether there was any.

    :raises ValueError: as for :meth:`CompatTable.apply`.
    """
    met = False
    for device in devices:
        if device.device_type != setting.device:
            continue
        met = True
        known = device.properties.get(setting.property)
        if known is not None:
            try:
                value = known.parse(setting.value)
            except ValueError as error:
                raise ValueError(f"{setting.device}.{setting.property}: {error}") from error
            setattr(device, known.attribute, value)
        elif not setting.optional:
            raise ValueError(f"{setting.device} has no property {setting.property!r}")
    return met
