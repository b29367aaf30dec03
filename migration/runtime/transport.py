"""Where a channel comes from: QEMU's migration URIs.

``tcp:HOST:PORT`` and ``unix:PATH`` connect and listen. A listener accepts one connection at a time
and is closed by :meth:`Listener.close`, also while it waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from dataclasses import dataclass

from .channel import Channel
from .errors import MigrationError

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Uri:
    """A parsed migration URI: its scheme and the rest."""

    scheme: str
    rest: str

    def __str__(self) -> str:
        return f"{self.scheme}:{self.rest}"


def parse_uri(text: str) -> Uri:
    """:raises MigrationError: no scheme this runtime knows."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in ("tcp", "unix") or not rest:
        raise MigrationError(f"unknown migration protocol: {text}; use tcp:HOST:PORT or unix:PATH")
    return Uri(scheme, rest)


def split_host_port(rest: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``:PORT`` (all interfaces).

    :raises MigrationError: no port, or not a number.
    """
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise MigrationError(f"tcp:{rest}: expected tcp:HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def connect(uri: str) -> Channel:
    """Connect to a listening destination; waits at most :data:`CONNECT_TIMEOUT_S`.

    :raises MigrationError: nobody listens there, or the URI is not one.
    """
    parsed = parse_uri(uri)
    try:
        if parsed.scheme == "unix":
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(CONNECT_TIMEOUT_S)
                connection.connect(parsed.rest)
            except BaseException:
                connection.close()
                raise
        else:
            host, port = split_host_port(parsed.rest)
            connection = socket.create_connection((host or "localhost", port), CONNECT_TIMEOUT_S)
    except OSError as error:
        raise MigrationError(f"Failed to connect to '{uri}': {error.strerror or error}") from error
    return Channel.over_socket(connection, peer=uri)


class Listener:
    """Listens at a URI. Unix sockets are made with mode 0600 and removed again."""

    def __init__(self, uri: str) -> None:
        """:raises MigrationError: the address is in use, or not one we can listen on."""
        parsed = parse_uri(uri)
        self._path: str | None = None
        try:
            self._socket = self._open(parsed)
        except OSError as error:
            raise MigrationError(
                f"Failed to listen on '{uri}': {error.strerror or error}"
            ) from error
        self.uri = uri if parsed.scheme == "unix" else self._tcp_name()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)

    def _open(self, parsed: Uri) -> socket.socket:
        if parsed.scheme == "unix":
            _remove_stale(parsed.rest)
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            old = os.umask(0o177)
            try:
                listening.bind(parsed.rest)
            except BaseException:
                listening.close()
                raise
            finally:
                os.umask(old)
            self._path = parsed.rest
            listening.listen(1)
            return listening
        host, port = split_host_port(parsed.rest)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1)

    def _tcp_name(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"

    def accept(self) -> Channel:
        """The next connection; waits without the GIL.

        :raises MigrationError: :meth:`close` was called meanwhile.
        """
        ready, _, _ = select.select([self._socket, self._wake_read], [], [])
        if self._wake_read in ready:
            raise MigrationError(f"no longer listening on {self.uri}")
        connection, address = self._socket.accept()
        peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else self.uri
        return Channel.over_socket(connection, peer=peer)

    def wake(self) -> None:
        """Any thread: a waiting :meth:`accept` gives up."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Stop listening and remove the socket file. Call when no thread is in :meth:`accept`."""
        self._socket.close()
        for fd in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                os.close(fd)
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def _remove_stale(path: str) -> None:
    """A socket nobody listens on is left over from a crash; anything else stays untouched."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise MigrationError(f"Failed to listen on 'unix:{path}': the file exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise MigrationError(f"Failed to listen on 'unix:{path}': somebody else listens there")
