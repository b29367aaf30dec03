"""The first 64 bytes of a multifd channel: which channel of which VM it is.

    be32 magic 0x11223344 | be32 version 1 | 16 bytes UUID (zero: none) | u8 channel | 39 zero bytes

Packets of pages follow; their codec is part of the data plane in C (``csrc/multifd.h``).

Source: QEMU ``migration/multifd.c``, ``MultiFDInit_t``.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from .constants import MULTIFD_INITIAL_BYTES, MULTIFD_MAGIC, MULTIFD_VERSION
from .errors import RemoteStreamError

_GREETING = struct.Struct(">II16sB39x")
assert _GREETING.size == MULTIFD_INITIAL_BYTES
_SECTION = "multifd greeting"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a multifd channel says first.

    :ivar channel: 0 to 254. :ivar vm: the VM's UUID; None: it has none.
    """

    channel: int
    vm: uuid.UUID | None = None


def encode_greeting(greeting: Greeting) -> bytes:
    """All 64 bytes."""
    vm = bytes(16) if greeting.vm is None else greeting.vm.bytes
    return _GREETING.pack(MULTIFD_MAGIC, MULTIFD_VERSION, vm, greeting.channel)


def decode_greeting(data: bytes) -> Greeting:
    """From 64 bytes. :raises RemoteStreamError: no multifd channel, or one of another version."""
    magic, version, vm, channel = _GREETING.unpack(data)
    if magic != MULTIFD_MAGIC:
        raise RemoteStreamError(
            f"magic {magic:#010x} is no multifd channel's", offset=0, section=_SECTION
        )
    if version != MULTIFD_VERSION:
        raise RemoteStreamError(
            f"multifd version {version}, not {MULTIFD_VERSION}", offset=4, section=_SECTION
        )
    return Greeting(channel, uuid.UUID(bytes=vm) if any(vm) else None)
