"""Sizes and switches as people write them: ``512M``, ``1.5G``, ``on``."""

from __future__ import annotations

import re
from fractions import Fraction

_SUFFIX_BITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgtpe]?)(?:i?b)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str, *, default_unit: str = "B") -> int:
    """``text`` in whole bytes, rounded down. A plain number counts in ``default_unit``.

    Units: B K M G T P E, powers of 1024, in either case.

    :raises ValueError: not a size, or 2**64 and more.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write a number and one of B K M G T, e.g. 512M")
    number, suffix = match.groups()
    bits = _SUFFIX_BITS[(suffix or default_unit).lower()]
    if "." in number and bits == 0:
        raise ValueError(f"{text!r}: a number of bytes is a whole number")
    size = int(Fraction(number) * (1 << bits))
    if size >= 1 << 64:
        raise ValueError(f"{text!r} does not fit 64 bits")
    return size


def format_size(size: int) -> str:
    """A size for people: ``512 MiB``, ``1.5 GiB``, ``4097 B``; at most one decimal."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def parse_switch(text: str) -> bool:
    """``on``/``off`` (and yes/no, true/false) as a bool.

    :raises ValueError: anything else.
    """
    lowered = text.lower()
    if lowered in ("on", "yes", "true"):
        return True
    if lowered in ("off", "no", "false"):
        return False
    raise ValueError(f"expected 'on' or 'off', not {text!r}")
