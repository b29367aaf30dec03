"""Limits that bite only under load: locked memory, mappings, pipes, sockets, overcommit."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket

from guestmem.geometry import format_size
from uffd import Mapping, UffdError

from .. import facts
from .._native import lib
from ..row import Cause, Check, Outcome, Tier, no, yes

_GROUP = "limits"
_MIB = 1 << 20
_PIPE_BYTES = 1 * _MIB
_SOCKET_BYTES = 4 * _MIB
_MAPPINGS_USUAL = 65530


def _bytes(limit: int) -> str:
    return "no limit" if limit == resource.RLIM_INFINITY else format_size(limit)


def memlock() -> Outcome:
    """Lock as much as this host has, on fault: counted, but nothing is taken.

    QEMU locks guest RAM with -overcommit mem-lock=on and for RDMA and device assignment.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    result = lib.host_can_lock(total)
    if result == 0:
        return yes(f"all of RAM; RLIMIT_MEMLOCK {_bytes(soft)}")
    return no(
        Cause.PERMISSION,
        f"RLIMIT_MEMLOCK is {_bytes(soft)} (at most {_bytes(hard)}) and no CAP_IPC_LOCK",
        "ulimit -l unlimited (as root), or LimitMEMLOCK=infinity in the unit",
    )


def max_map_count() -> Outcome:
    """A registration splits the mapping at its ends, and so does each discard of a huge page."""
    path = "/proc/sys/vm/max_map_count"
    text = facts.text_of(path)
    if not text.isdigit():
        return no(Cause.RESTRICTION, f"{path} cannot be read")
    if int(text) >= _MAPPINGS_USUAL:
        return yes(f"vm.max_map_count={text}")
    remedy = f"sysctl -w vm.max_map_count={_MAPPINGS_USUAL} (as root)"
    return no(Cause.SETTING, f"vm.max_map_count={text}, less than usual", remedy)


def pipe_buffer() -> Outcome:
    """exec: migrations and compressors run through pipes; 64 KiB makes each a stop-and-go."""
    reader, writer = os.pipe()
    most = facts.text_of("/proc/sys/fs/pipe-max-size") or "unknown"
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError as error:
        usual = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        return no(
            Cause.PERMISSION if error.errno == errno.EPERM else Cause.SETTING,
            f"{format_size(usual)} at most (fs.pipe-max-size={most}): {error.strerror}",
            f"sysctl -w fs.pipe-max-size={_PIPE_BYTES} fs.pipe-user-pages-soft=0 (as root)",
        )
    return yes(f"granted; fs.pipe-max-size={most}")


def socket_buffers() -> Outcome:
    """TCP grows its buffers by itself, up to tcp_rmem and tcp_wmem: what one stream can fill."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        asked = stream.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    grown = [_last_number(f"/proc/sys/net/ipv4/tcp_{name}") for name in ("rmem", "wmem")]
    detail = f"TCP: {_size(grown[0])} in, {_size(grown[1])} out; by asking {_size(asked)}"
    if min(grown) >= _SOCKET_BYTES:
        return yes(detail)
    page = os.sysconf("SC_PAGESIZE")  # the kernel's own least
    return no(
        Cause.SETTING,
        f"{detail}: little for a fast link with a long way",
        f"sysctl -w net.ipv4.tcp_rmem='{page} 131072 6291456' "
        f"net.ipv4.tcp_wmem='{page} 16384 {_SOCKET_BYTES}' (as root)",
    )


def _last_number(path: str) -> int:
    words = facts.text_of(path).split()
    return int(words[-1]) if words and words[-1].isdigit() else 0


def _size(length: int) -> str:
    """Also of odd numbers: ``208 KiB``."""
    unit = _MIB if length >= _MIB else 1 << 10
    return format_size(length // unit * unit) if length else "unknown"


def overcommit() -> Outcome:
    """Map as much as this host has without reserving it: guest RAM larger than what is free."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    value = facts.text_of("/proc/sys/vm/overcommit_memory") or "unknown"
    try:
        Mapping.anonymous(total)
    except UffdError as error:
        return no(
            Cause.SETTING,
            f"vm.overcommit_memory={value}: {error.strerror}",
            "sysctl -w vm.overcommit_memory=1 (as root)",
        )
    return yes(f"vm.overcommit_memory={value}")


def open_files() -> Outcome:
    """A channel each, an fd each for RAM blocks, vCPUs, and clients of the monitor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"RLIMIT_NOFILE {soft} (at most {hard})"
    if soft >= 256:
        return yes(detail)
    return no(Cause.SETTING, detail, "ulimit -n 1024")


def checks() -> list[Check]:
    """The rows about limits."""
    optional = Tier.OPTIONAL
    return [
        Check("memlock", "all guest RAM may be locked", optional, _GROUP, memlock),
        Check("max-map-count", "mappings of a process", optional, _GROUP, max_map_count),
        Check("overcommit", "RAM mapped without reserving it", optional, _GROUP, overcommit),
        Check("open-files", "open files", optional, _GROUP, open_files),
        Check("pipe-buffer", "pipes of 1 MiB", optional, _GROUP, pipe_buffer),
        Check("socket-buffers", "socket buffers", optional, _GROUP, socket_buffers),
    ]
