"""Listening sockets of monitors and migrations: who can reach them, and whose connection it is.

Whoever reaches a monitor owns the VM, and whoever reaches a waiting destination puts a VM there. So
a socket file is this user's alone, a TCP port listens on the loopback only, and the kernel is asked
who connected. ``allow-uid=N`` lets a further user in, ``allow-remote=on`` other hosts (whose users
nobody can ask for).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
import struct
from dataclasses import dataclass

BACKLOG = 256  # all multifd channels of a source may come at once
_PRIVATE, _REACHABLE = 0o600, 0o666
_UNIX_PATH_BYTES_MAX = 107  # sun_path less its terminating zero, unix(7)


@dataclass(frozen=True)
class Access:
    """Who else may connect, beside this process's own user and root.

    :ivar allows_remote: other hosts; then nobody is asked who they are.
    :ivar uids: further users of this host.
    """

    allows_remote: bool = False
    uids: frozenset[int] = frozenset()

    def __str__(self) -> str:
        remote = ",allow-remote=on" if self.allows_remote else ""
        return remote + "".join(f",allow-uid={uid}" for uid in sorted(self.uids))


OWN_ONLY = Access()


def split_access(text: str) -> tuple[str, Access]:
    """``ADDRESS[,allow-remote=on|off][,allow-uid=N]...``: the address, and what follows it.

    Anything else after a comma stays part of the address.

    :raises ValueError: a value that is none.
    """
    allows_remote = False
    uids: set[int] = set()
    while True:
        body, comma, option = text.rpartition(",")
        name, equals, value = option.partition("=")
        if not comma or not equals or name not in ("allow-remote", "allow-uid"):
            return text, Access(allows_remote, frozenset(uids))
        if name == "allow-uid":
            if not value.isdecimal() or int(value) > 0xFFFFFFFE:
                raise ValueError(f"allow-uid={value}: a numeric user id is expected")
            uids.add(int(value))
        elif value in ("on", "off"):
            allows_remote = value == "on"
        else:
            raise ValueError(f"allow-remote={value}: on or off is expected")
        text = body


def listen_unix(path: str, access: Access = OWN_ONLY) -> socket.socket:
    """A listening socket file of mode 0600; 0666 when other users are let in, whom
    :func:`refusal` tells apart.

    A file left over from a crash is replaced; anything else is left alone.

    :raises OSError: in use, no socket, no such folder, ...
    """
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
        raise OSError(
            errno.ENAMETOOLONG, f"a socket's path has at most {_UNIX_PATH_BYTES_MAX} bytes"
        )
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind(2) creates the file with the socket inode's mode (less the umask), so setting the
        # mode first leaves no moment in which others may connect
        os.fchmod(listening.fileno(), _PRIVATE)
        listening.bind(path)
        if access.uids:
            os.chmod(path, _REACHABLE)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
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


def listen_tcp(host: str, port: int, access: Access = OWN_ONLY) -> socket.socket:
    """A listening port; ``host`` a name or an address of IPv4 or IPv6, ``port`` 0 any free one.

    :raises OSError: in use, no such host; an address others reach without ``allow-remote``.
    """
    family, _, _, _, name = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    if not access.allows_remote and not ipaddress.ip_address(name[0]).is_loopback:
        raise PermissionError(
            errno.EPERM,
            "not a loopback address, and whoever reaches it decides what runs here: "
            "append ,allow-remote=on if that is meant",
        )
    return socket.create_server(name[:2], family=family, backlog=BACKLOG)


def refusal(client: socket.socket, access: Access = OWN_ONLY) -> str | None:
    """Why this connection is not let in; None: it is."""
    if client.family == socket.AF_UNIX:
        uid: int | None = peer_uid_unix(client)
    elif access.allows_remote:
        return None
    else:
        uid = peer_uid_tcp(client)
    if uid in (0, os.geteuid()) or uid in access.uids:
        return None
    who = "an unknown user" if uid is None else f"user id {uid}"
    return f"a connection from {who} was refused; ,allow-uid=N behind the address lets one in"


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
    try:
        ours, theirs = client.getsockname(), client.getpeername()
    except OSError:
        return None
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
