"""Where a monitor listens: its address, and who may connect (see :mod:`runtime.sockets`)."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

from migration.runtime.sockets import (
    OWN_ONLY,
    Access,
    listen_tcp,
    listen_unix,
    refusal,
    split_access,
)

from .errors import QMPError


@dataclass(frozen=True)
class UnixAddress:
    """A socket file."""

    path: str
    access: Access = OWN_ONLY

    def __str__(self) -> str:
        return f"unix:{self.path}{self.access}"


@dataclass(frozen=True)
class TCPAddress:
    """A TCP port. ``port`` 0 lets the kernel choose."""

    host: str
    port: int
    access: Access = OWN_ONLY

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}{self.access}"


Address = UnixAddress | TCPAddress
_PATH_BYTES_MAX = 107  # sun_path less its terminating zero, unix(7)


def parse_address(text: str) -> Address:
    """``unix:PATH`` or ``tcp:HOST:PORT`` with QEMU's chardev options after commas.

    ``server`` and ``wait=off`` are accepted because QEMU users write them; ``wait=on`` is refused.
    ``allow-remote=on`` and ``allow-uid=N`` are ours: without them a TCP monitor listens on loopback
    addresses only, and only this user and root are let in.

    :raises ValueError: anything else.
    """
    body, *options = text.split(",")
    wanted = ""
    for option in options:
        if option.startswith(("allow-remote=", "allow-uid=")):
            wanted += f",{option}"
        elif option not in ("server", "server=on", "nowait", "wait=off"):
            raise ValueError(f"{text!r}: option {option!r} is not supported")
    _, access = split_access(wanted)
    scheme, _, rest = body.partition(":")
    if scheme == "unix" and rest:
        if len(os.fsencode(rest)) > _PATH_BYTES_MAX:
            raise ValueError(f"{rest!r}: a socket's path has at most {_PATH_BYTES_MAX} bytes")
        return UnixAddress(rest, access)
    if scheme == "tcp":
        host, colon, port = rest.rpartition(":")
        if colon and port.isdecimal() and int(port) < 65536:
            return TCPAddress(host.strip("[]") or "127.0.0.1", int(port), access)
    raise ValueError(f"{text!r} is not an address: write unix:PATH or tcp:HOST:PORT")


class Listener:
    """A listening socket and, for unix, its file, which is removed when it is closed.

    :ivar address: as bound: a TCP port 0 replaced by the real one.
    """

    def __init__(self, address: Address) -> None:
        """Bind and listen. :raises QMPError: naming the address and the cause."""
        self.address: Address
        try:
            if isinstance(address, UnixAddress):
                self.socket = listen_unix(address.path, address.access)
                self.address = address
            else:
                self.socket = listen_tcp(address.host, address.port, address.access)
                port = self.socket.getsockname()[1]
                self.address = TCPAddress(address.host, port, address.access)
        except OSError as error:
            raise QMPError(f"cannot listen on {address}: {error.strerror or error}") from error
        self.socket.setblocking(False)
        self._file = _identity(address.path) if isinstance(address, UnixAddress) else None

    def accept(self) -> socket.socket | None:
        """The next client, already checked to be allowed; None when there is none (any more)."""
        try:
            client, _ = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                return None
            raise
        client.setblocking(False)
        if refusal(client, self.address.access) is not None:
            client.close()
            return None
        return client

    def close(self) -> None:
        """Stop listening and remove the file, unless somebody else put another one there."""
        self.socket.close()
        if isinstance(self.address, UnixAddress) and _identity(self.address.path) == self._file:
            os.unlink(self.address.path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
