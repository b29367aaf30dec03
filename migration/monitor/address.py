"""Where a monitor listens: addresses, sockets with safe permissions, and who may connect."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
import struct
from dataclasses import dataclass

from .errors import QMPError

_UNIX_PATH_BYTES_MAX = 107  # sun_path less its terminating zero, unix(7)
_BACKLOG = 8


@dataclass(frozen=True)
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TCPAddress:
    """A TCP port. ``port`` 0 lets the kernel choose."""

    host: str
    port: int
    allows_remote: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


Address = UnixAddress | TCPAddress


def parse_address(text: str) -> Address:
    """``unix:PATH`` or ``tcp:HOST:PORT`` with QEMU's chardev options after commas.

    ``server`` and ``wait=off`` are accepted because QEMU users write them; ``wait=on`` is refused.
    ``allow-remote=on`` is ours: without it a TCP monitor listens on loopback addresses only, since
    whoever reaches a monitor owns the VM.

    :raises ValueError: anything else.
    """
    body, *options = text.split(",")
    allows_remote = False
    for option in options:
        if option == "allow-remote=on":
            allows_remote = True
        elif option not in ("server", "server=on", "nowait", "wait=off", "allow-remote=off"):
            raise ValueError(f"{text!r}: option {option!r} is not supported")
    scheme, _, rest = body.partition(":")
    if scheme == "unix" and rest:
        if len(os.fsencode(rest)) > _UNIX_PATH_BYTES_MAX:
            raise ValueError(f"{rest!r}: a socket's path has at most {_UNIX_PATH_BYTES_MAX} bytes")
        return UnixAddress(rest)
    if scheme == "tcp":
        host, colon, port = rest.rpartition(":")
        if colon and port.isdecimal() and int(port) < 65536:
            return TCPAddress(host.strip("[]") or "127.0.0.1", int(port), allows_remote)
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
                self.socket, self.address = _listen_unix(address), address
            else:
                self.socket = _listen_tcp(address)
                port = self.socket.getsockname()[1]
                self.address = TCPAddress(address.host, port, address.allows_remote)
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
        if not self._is_allowed(client):
            client.close()
            return None
        return client

    def _is_allowed(self, client: socket.socket) -> bool:
        if isinstance(self.address, UnixAddress):
            uid: int | None = peer_uid_unix(client)
        elif self.address.allows_remote:
            return True
        else:
            uid = peer_uid_tcp(client)
        return uid in (0, os.geteuid())

    def close(self) -> None:
        """Stop listening and remove the file, unless somebody else put another one there."""
        self.socket.close()
        if isinstance(self.address, UnixAddress) and _identity(self.address.path) == self._file:
            os.unlink(self.address.path)


def _listen_unix(address: UnixAddress) -> socket.socket:
    _clear_stale(address.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind(2) creates the file with the socket inode's mode (less the umask), so setting the
        # mode first leaves no moment in which others may connect
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(address.path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _clear_stale(path: str) -> None:
    """Remove a socket file nobody listens on any more; leave everything else alone."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "the path exists and is not a socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, "another process listens there")
    os.unlink(path)


def _listen_tcp(address: TCPAddress) -> socket.socket:
    family, _, _, _, name = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    if not address.allows_remote and not ipaddress.ip_address(name[0]).is_loopback:
        raise PermissionError(
            errno.EPERM,
            "not a loopback address, and whoever reaches a monitor owns the VM: "
            "append ,allow-remote=on if that is meant",
        )
    return socket.create_server(name[:2], family=family, backlog=_BACKLOG)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def peer_uid_unix(client: socket.socket) -> int:
    """The effective user id the peer had when it connected (``SO_PEERCRED``, unix(7))."""
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def peer_uid_tcp(client: socket.socket) -> int | None:
    """The user who owns the other end of a loopback connection; None when it is gone already.

    Any local user reaches a loopback port, so the port alone proves nothing. The kernel lists every
    TCP socket of the network namespace with its owner, the client's own among them (proc_net_tcp in
    the kernel's documentation: columns 1 local, 2 remote, 7 uid, 9 inode; a dead socket has inode
    0).
    """
    ours, theirs = client.getsockname(), client.getpeername()
    table = "/proc/thread-self/net/" + ("tcp6" if client.family == socket.AF_INET6 else "tcp")
    wanted = [_proc_endpoint(*end[:2]) for end in (theirs, ours)]
    with open(table, encoding="ascii") as rows:
        for row in rows:
            fields = row.split()
            if fields[1:3] == wanted and fields[9] != "0":
                return int(fields[7])
    return None


def _proc_endpoint(host: str, port: int) -> str:
    """An endpoint as the table spells it: 32-bit words in host order, then the port, in hex."""
    packed = ipaddress.ip_address(host.partition("%")[0]).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
