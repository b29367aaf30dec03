"""URIs and QMP's address objects: ``channels`` of ``migrate`` (QEMU 8.2+), ``socket-address``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from .errors import QMPError


def uri_from_channels(channels: object) -> str:
    """The URI of the one main channel in ``channels``.

    :raises QMPError: not exactly one main channel, or an address with no URI form.

    Source: QEMU ``qapi/migration.json``, ``MigrationChannel`` and ``MigrationAddress``.
    """
    if not isinstance(channels, list) or len(channels) != 1 or not isinstance(channels[0], dict):
        raise QMPError("'channels' takes exactly one channel")
    channel = channels[0]
    kind, address = channel.get("channel-type"), channel.get("addr")
    if kind != "main":
        raise QMPError(f"channel type {kind!r} is not supported, only 'main'")
    if not isinstance(address, dict):
        raise QMPError("the channel's 'addr' must be an object")
    transport = address.get("transport")
    if transport == "socket":
        return _socket_uri(address)
    if transport == "exec":
        return f"exec:{_exec_command(address)}"
    if transport == "file":
        return f"file:{_member(address, 'filename')},offset={_offset(address)}"
    raise QMPError(f"transport {transport!r} is not supported: use socket, exec or file")


def socket_address(uri: str) -> dict[str, str] | None:
    """A listening URI as QMP's ``SocketAddress``; None when it is no socket."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        return {"type": "unix", "path": rest}
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        return {"type": "inet", "host": host.strip("[]"), "port": port}
    return None


def _socket_uri(address: Mapping[str, object]) -> str:
    kind = address.get("type")
    if kind == "unix":
        return f"unix:{_member(address, 'path')}"
    if kind == "inet":
        host = _member(address, "host")
        port = _member(address, "port")
        access = ",allow-remote=on" if address.get("x-allow-remote") is True else ""
        return (f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}") + access
    if kind == "fd":
        return f"fd:{_member(address, 'str')}"
    raise QMPError(f"socket type {kind!r} is not supported: use inet, unix or fd")


def _exec_command(address: Mapping[str, object]) -> str:
    words = address.get("args")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        raise QMPError("an exec channel's 'args' must be a list of strings")
    return shlex.join(words)


def _offset(address: Mapping[str, object]) -> int:
    offset = address.get("offset", 0)
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
        raise QMPError("a file channel's 'offset' must be a non-negative integer")
    return offset


def _member(address: Mapping[str, object], name: str) -> str:
    value = address.get(name)
    if not isinstance(value, str) or not value:
        raise QMPError(f"the channel's address needs {name!r}, a string")
    return value
