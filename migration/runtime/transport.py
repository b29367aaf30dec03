"""Where a channel comes from: QEMU's migration URIs.

| URI | connects | listens |
| --- | --- | --- |
| ``tcp:HOST:PORT`` | yes | one connection, from this user or root of this host; an empty host is
the loopback; other addresses need ``,allow-remote=on`` |
| ``unix:PATH`` | yes | one connection, from this user or root; the socket file has mode 0600 |
| ``exec:COMMAND`` | the command's standard input | its standard output |
| ``fd:N`` | an inherited descriptor, or one passed by ``getfd`` | the same |
| ``file:PATH[,offset=N]`` | writes the file | reads it |

``,allow-uid=N`` behind a tcp or unix address that is listened on lets a further user in. tcp, unix,
a command and a socket descriptor are two-way; a pipe and a file are one-way and carry no
postcopy.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .channel import Channel
from .errors import MigrationError
from .sockets import OWN_ONLY, Access, listen_tcp, listen_unix, refusal, split_access

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
CHILD_TIMEOUT_S = 10.0
SCHEMES = ("tcp", "unix", "exec", "fd", "file")

FdLookup = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Uri:
    """A parsed migration URI: its scheme, the rest, and who may connect where it listens."""

    scheme: str
    rest: str
    access: Access = OWN_ONLY


def parse_uri(text: str) -> Uri:
    """:raises MigrationError: no scheme this runtime knows."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES or not rest:
        raise MigrationError(
            f"unknown migration protocol: {text}; use tcp:HOST:PORT, unix:PATH, exec:COMMAND, fd:N "
            "or file:PATH"
        )
    if scheme not in ("tcp", "unix"):
        return Uri(scheme, rest)
    try:
        address, access = split_access(rest)
    except ValueError as error:
        raise MigrationError(f"{text}: {error}") from None
    return Uri(scheme, address, access)


def is_multi_channel(uri: str) -> bool:
    """Whether a second connection can be made to the same place (preempt, multifd)."""
    return uri.partition(":")[0] in ("tcp", "unix")


def split_host_port(rest: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT``; an empty host means the loopback.

    :raises MigrationError: no port, or not a number.
    """
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise MigrationError(f"tcp:{rest}: expected tcp:HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def connect(uri: str, *, fds: FdLookup | None = None) -> Channel:
    """An outgoing channel; waits for a connection at most :data:`CONNECT_TIMEOUT_S`.

    :param fds: looks up a name of ``fd:NAME`` (as ``getfd`` stored it).
    :raises MigrationError: it cannot be had; says why.
    """
    parsed = parse_uri(uri)
    if parsed.access != OWN_ONLY:
        raise MigrationError(
            f"{uri}: allow-remote and allow-uid are for the side that listens; leave them out here"
        )
    try:
        match parsed.scheme:
            case "tcp":
                address = split_host_port(parsed.rest)
                connection = socket.create_connection(address, CONNECT_TIMEOUT_S)
                return Channel.over_socket(connection, peer=uri)
            case "unix":
                return _connect_unix(parsed.rest, uri)
            case "exec":
                return _command(parsed.rest, uri)
            case "fd":
                return _descriptor(parsed.rest, uri, fds, writes=True)
            case _:
                return _file(parsed.rest, uri, writes=True)
    except OSError as error:
        raise MigrationError(f"Failed to connect to '{uri}': {error.strerror or error}") from error


def _connect_unix(path: str, uri: str) -> Channel:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return Channel.over_socket(connection, peer=uri)


@contextlib.contextmanager
def _restoring(mask: set[int]) -> Iterator[None]:
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Child:
    """A command at the other end of a socket pair: its standard input and output are one socket."""

    def __init__(self, command: str) -> None:
        ours, theirs = socket.socketpair()
        # This process may block the signals it waits for; a command must be able to get them.
        blocked = signal.pthread_sigmask(signal.SIG_SETMASK, [])
        with theirs, _restoring(blocked):
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                close_fds=True,
            )
        self.socket = ours
        self._command = command

    def finish(self) -> None:
        """No more bytes: let it end. :raises MigrationError: it failed, so nothing can be relied
        on."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        try:
            status = self.process.wait(CHILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise MigrationError(
                f"the command '{self._command}' did not end within {CHILD_TIMEOUT_S:g} s"
            ) from None
        if status:
            raise MigrationError(f"the command '{self._command}' ended with status {status}")

    def close(self) -> None:
        self.socket.close()
        try:
            self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _command(command: str, uri: str) -> Channel:
    child = _Child(command)
    fd = child.socket.fileno()
    return Channel(
        fd, fd, peer=uri, close=child.close, finish=child.finish, is_two_way=True, may_be_deaf=True
    )


def _descriptor(name: str, uri: str, fds: FdLookup | None, *, writes: bool) -> Channel:
    """``fd:``: a number is one this process inherited, a name one that ``getfd`` stored."""
    if name.isdigit():
        fd = os.dup(int(name))
        os.set_inheritable(fd, False)
    elif fds is not None:
        fd = fds(name)
    else:
        raise MigrationError(f"{uri}: no descriptor of that name")

    def close() -> None:
        os.close(fd)

    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return Channel(fd, fd, peer=uri, close=close, is_two_way=True)
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if mode == (os.O_RDONLY if writes else os.O_WRONLY):
        close()
        raise MigrationError(f"{uri} cannot be {'written' if writes else 'read'}")
    read_fd, write_fd = (-1, fd) if writes else (fd, -1)
    return Channel(read_fd, write_fd, peer=uri, close=close, is_two_way=False)


def _file(rest: str, uri: str, *, writes: bool) -> Channel:
    path, offset = split_offset(rest, uri)
    flags = os.O_WRONLY | os.O_CREAT if writes else os.O_RDONLY
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    if writes and stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, offset)
    if offset:
        os.lseek(fd, offset, os.SEEK_SET)

    def finish() -> None:
        if writes:
            os.fsync(fd)

    read_fd, write_fd = (-1, fd) if writes else (fd, -1)
    return Channel(
        read_fd, write_fd, peer=uri, close=lambda: os.close(fd), finish=finish, is_two_way=False
    )


def split_offset(rest: str, uri: str) -> tuple[str, int]:
    """``PATH[,offset=N]`` of ``file:``. :raises MigrationError: N is no offset."""
    path, comma, option = rest.rpartition(",offset=")
    if not comma:
        return rest, 0
    try:
        offset = int(option, 0)
    except ValueError:
        raise MigrationError(f"{uri}: offset={option} is no number") from None
    if offset < 0:
        raise MigrationError(f"{uri}: a negative offset")
    return path, offset


class Listener:
    """Waits at a URI for the one channel of an incoming migration.

    :ivar uri: what a source connects to; with the port the kernel chose, if it did.
    """

    def __init__(self, uri: str, *, fds: FdLookup | None = None) -> None:
        """:raises MigrationError: the address is in use, or not one we can listen on."""
        parsed = parse_uri(uri)
        self._parsed = parsed
        self._fds = fds
        self._path: str | None = None
        self._socket: socket.socket | None = None
        self.uri = uri
        try:
            if parsed.scheme == "unix":
                self._socket = listen_unix(parsed.rest, parsed.access)
                self._path = parsed.rest
                self.uri = f"unix:{parsed.rest}"
            elif parsed.scheme == "tcp":
                self._socket = self._listen_tcp(parsed)
            elif parsed.scheme == "file":
                os.stat(split_offset(parsed.rest, uri)[0])
        except OSError as error:
            reason = error.strerror or error
            raise MigrationError(f"Failed to listen on '{uri}': {reason}") from error
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)

    def _listen_tcp(self, parsed: Uri) -> socket.socket:
        listening = listen_tcp(*split_host_port(parsed.rest), parsed.access)
        host, port = listening.getsockname()[:2]
        self.uri = f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
        return listening

    def accept(self) -> Channel:
        """The next connection (or the command, descriptor or file); waits without the GIL. One from
        another user is closed and noted, and the waiting goes on.

        :raises MigrationError: :meth:`wake` was called meanwhile.
        """
        rest, uri = self._parsed.rest, self.uri
        if self._socket is None:
            try:
                match self._parsed.scheme:
                    case "exec":
                        return _command(rest, uri)
                    case "fd":
                        return _descriptor(rest, uri, self._fds, writes=False)
                    case _:
                        return _file(rest, uri, writes=False)
            except OSError as error:
                raise MigrationError(f"'{uri}': {error.strerror or error}") from error
        while True:
            channel = self.wait()
            if channel is not None:
                return channel

    def wait(self, watched: Sequence[int] = (), timeout_s: float | None = None) -> Channel | None:
        """The next connection to a listening socket, or None: one of the ``watched`` descriptors
        can be read, a stranger was turned away, or the time is over.

        :raises MigrationError: :meth:`wake` was called meanwhile.
        """
        assert self._socket is not None
        poll = select.poll()
        for fd in (self._socket.fileno(), self._wake_read, *watched):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
        if self._wake_read in ready:
            raise MigrationError(f"no longer listening on {self.uri}")
        if self._socket.fileno() not in ready:
            return None
        connection, address = self._socket.accept()
        reason = refusal(connection, self._parsed.access)
        if reason is None:
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else self.uri
            return Channel.over_socket(connection, peer=peer)
        connection.close()  # a stranger must not end the waiting for the right one
        log.warning("%s: %s", self.uri, reason)
        return None

    def wake(self) -> None:
        """Any thread: a waiting :meth:`accept` gives up."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Stop listening and remove the socket file. Call when no thread is in :meth:`accept`."""
        if self._socket is not None:
            self._socket.close()
        for fd in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                os.close(fd)
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
