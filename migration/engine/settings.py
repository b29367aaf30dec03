"""Capabilities and parameters by QEMU's names. What is not offered is refused, never accepted and
ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


class SettingError(ValueError):
    """An unknown name, a value out of range, or a combination that cannot work."""


OFFERED: Mapping[str, bool] = {
    "events": False,
    "return-path": True,
    "postcopy-ram": False,
    "postcopy-preempt": False,
    "pause-before-switchover": False,
    "release-ram": False,
    "auto-converge": False,
    "xbzrle": False,
    "postcopy-blocktime": False,
    "multifd": False,
    "mapped-ram": False,
    "validate-uuid": False,
    "switchover-ack": False,
    "x-ignore-shared": False,
}
"""Capability name -> default. ``return-path`` is on by default: with it the source knows how it
ended."""

KNOWN = frozenset(
    {
        "rdma-pin-all", "zero-blocks", "compress", "x-colo",
        "block", "dirty-bitmaps", "late-block-activate",
        "background-snapshot", "zero-copy-send",
        "dirty-limit",
    }
)  # fmt: skip
"""QEMU's other capabilities, so that a refusal can tell "not here" from "no such thing"."""


Value: TypeAlias = int | bool | str


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tunable: its default and its range (numbers, both ends included), or what it may be.

    :ivar not_offered: QEMU's other values, so that a refusal can tell "not here" from "no such
        value".
    """

    default: Value
    low: int = 0
    high: int = (1 << 63) - 1
    choices: tuple[str, ...] = ()
    not_offered: tuple[str, ...] = ()


PARAMETERS: Mapping[str, Parameter] = {
    "max-bandwidth": Parameter(128 << 20),
    "max-postcopy-bandwidth": Parameter(0),
    "avail-switchover-bandwidth": Parameter(0),
    "downtime-limit": Parameter(300, 0, 2_000_000),
    "throttle-trigger-threshold": Parameter(50, 1, 100),
    "cpu-throttle-initial": Parameter(20, 1, 99),
    "cpu-throttle-increment": Parameter(10, 1, 99),
    "cpu-throttle-tailslow": Parameter(False),
    "max-cpu-throttle": Parameter(99, 1, 99),
    "xbzrle-cache-size": Parameter(64 << 20, 4 << 10, 1 << 40),
    "multifd-channels": Parameter(2, 1, 255),
    "multifd-compression": Parameter(
        "none", choices=("none",), not_offered=("zlib", "zstd", "qpl", "uadk", "qatzip")
    ),
    "zero-page-detection": Parameter("multifd", choices=("none", "legacy", "multifd")),
    "mode": Parameter(
        "normal", choices=("normal", "cpr-transfer"), not_offered=("cpr-reboot", "cpr-exec")
    ),
    "x-checksum": Parameter(True),
    "x-split-run": Parameter(True),
    "x-sparse": Parameter(True),
    "x-memory-guard": Parameter(True),
    "x-hold-background": Parameter(False),
    "x-collapse": Parameter(False),
    "x-preempt-pre-7-2": Parameter(False),
    "x-multifd-flush-after-each-section": Parameter(False),
    "x-postcopy-sndbuf": Parameter(64 << 10, 16 << 10, 64 << 20),
}
"""Ours begin with ``x-``. ``x-checksum``, ``x-split-run``, ``x-sparse``: offer them to a peer of
our own kind. ``x-memory-guard``: refuse at ADVISE what this host has no memory for.
``x-collapse``: as destination, make huge pages of small ones once postcopy is over.
``x-hold-background``: in postcopy send only what is asked for. ``x-preempt-pre-7-2``: open the
preempt channel first and end it as a QEMU 7.2 does. ``x-multifd-flush-after-each-section``: as
source, multifd as machine types up to 8.0 have it. ``x-postcopy-sndbuf``: bytes that may
wait in the socket in postcopy, since a requested page queues behind them."""


def change_capabilities(
    current: Mapping[str, bool], changes: Mapping[str, bool]
) -> dict[str, bool]:
    """``current`` with ``changes``.

    :raises SettingError: an unknown capability, or one that is not offered switched on.
    """
    result = dict(current)
    for name, state in changes.items():
        if name in OFFERED:
            result[name] = bool(state)
        elif name in KNOWN:
            if state:
                raise SettingError(f"Capability '{name}' is not offered by this runtime")
        else:
            raise SettingError(f"Invalid parameter '{name}'")
    if result["postcopy-preempt"] and not result["postcopy-ram"]:
        raise SettingError("Postcopy preempt requires postcopy-ram")
    if result["switchover-ack"] and not result["return-path"]:
        raise SettingError("Capability 'switchover-ack' requires capability 'return-path'")
    for name in ("postcopy-ram", "xbzrle", "multifd"):
        if result["mapped-ram"] and result[name]:
            raise SettingError(f"Mapped-ram migration is incompatible with {name}")
    if result["multifd"] and result["xbzrle"]:
        raise SettingError("Multifd is not compatible with xbzrle")
    for name in ("postcopy-ram", "mapped-ram"):
        if result["x-ignore-shared"] and result[name]:
            raise SettingError(f"Ignore-shared is not compatible with {name}")
    return result


def change_parameters(
    current: Mapping[str, Value], changes: Mapping[str, object]
) -> dict[str, Value]:
    """``current`` with ``changes``.

    :raises SettingError: an unknown parameter, a value of another type or out of its range.
    """
    result = dict(current)
    for name, value in changes.items():
        known = PARAMETERS.get(name)
        if known is None:
            raise SettingError(f"Invalid parameter '{name}'")
        if known.choices:
            result[name] = _chosen(name, known, value)
            continue
        if isinstance(known.default, bool):
            if not isinstance(value, bool):
                raise SettingError(f"Parameter '{name}' expects a boolean")
            result[name] = value
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise SettingError(f"Parameter '{name}' expects an integer")
        if not known.low <= value <= known.high:
            raise SettingError(
                f"Parameter '{name}' expects a value in {known.low} to {known.high}, not {value}"
            )
        result[name] = value
    return result


def _chosen(name: str, known: Parameter, value: object) -> str:
    if isinstance(value, str) and value in known.choices:
        return value
    offered = ", ".join(known.choices)
    if value in known.not_offered:
        raise SettingError(
            f"Parameter '{name}': '{value}' is not offered by this runtime (only {offered})"
        )
    raise SettingError(f"Parameter '{name}' does not accept value '{value}': {offered}")


def default_parameters() -> dict[str, Value]:
    """Every parameter at its default."""
    return {name: parameter.default for name, parameter in PARAMETERS.items()}
