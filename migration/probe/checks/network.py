"""The way the pages go: sockets tried on this host, and what is known of the links out of it."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from .. import facts
from ..attempt import expect, patience_s
from ..row import Cause, Check, Outcome, Tier, no, yes

_GROUP = "network"
_LINKS = Path("/sys/class/net")
_ROUNDS = 20
_REQUEST, _REPLY = 16, (4 << 10) + 16  # a page request, and a page with its record's head
_TCP_USER_TIMEOUT, _TCP_NOTSENT_LOWAT = 18, 25


def loopback(family: socket.AddressFamily, address: str) -> Outcome:
    """Requests and pages go to and fro; the best round is the floor of a remote fault here."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((address, 0))
            listener.listen(1)
            near = socket.socket(family, socket.SOCK_STREAM)
            near.settimeout(patience_s())
            near.connect(listener.getsockname())
            far, _ = listener.accept()
    except OSError as error:
        return no(Cause.SETTING, f"{address}: {error.strerror}", "ip link set lo up (as root)")
    return _rounds(near, far)


def unix() -> Outcome:
    """The same through a UNIX socket."""
    return _rounds(*socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))


def _rounds(near: socket.socket, far: socket.socket) -> Outcome:
    for end in (near, far):
        end.settimeout(patience_s())
        with suppress(OSError):  # a UNIX socket has no such option, and no need of it
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_answer, args=(far,), daemon=True).start()
    best = min(_round(near) for _ in range(_ROUNDS))
    return yes(f"a page and back: {best / 1000:.0f} us at best")


def _answer(far: socket.socket) -> None:
    for _ in range(_ROUNDS):
        far.recv(_REQUEST, socket.MSG_WAITALL)
        far.sendall(bytes(_REPLY))


def _round(near: socket.socket) -> int:
    start = time.monotonic_ns()
    near.sendall(bytes(_REQUEST))
    got = near.recv(_REPLY, socket.MSG_WAITALL)
    expect(len(got) == _REPLY, "bytes were lost")
    return time.monotonic_ns() - start


def tcp_options() -> Outcome:
    """What keeps requested pages ahead of a deep buffer, and notices a dead peer."""
    wanted = (
        ("TCP_NODELAY", socket.TCP_NODELAY, 1),
        ("TCP_NOTSENT_LOWAT", _TCP_NOTSENT_LOWAT, 128 << 10),
        ("TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT, 3000),
    )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream:
        for name, option, value in wanted:
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
            got = stream.getsockopt(socket.IPPROTO_TCP, option)
            expect(got == value or (got and value == 1), f"{name}: asked for {value}, got {got}")
    control = facts.text_of("/proc/sys/net/ipv4/tcp_congestion_control") or "unknown"
    return yes(f"all accepted; congestion control {control}")


def link(name: str) -> Outcome:
    """What the driver tells of a link that is not the loopback."""
    state = facts.text_of(_LINKS / name / "operstate") or "unknown"
    mtu = facts.text_of(_LINKS / name / "mtu") or "unknown"
    speed = facts.text_of(_LINKS / name / "speed")
    rate = f"{speed} Mbit/s" if speed.isdigit() else "speed not told"
    detail = f"MTU {mtu}, {rate}"
    if state in ("up", "unknown"):
        return yes(f"{detail}{', default route' if name in _default_links() else ''}")
    return no(Cause.SETTING, f"{detail}, state {state}", f"ip link set {name} up (as root)")


def _default_links() -> frozenset[str]:
    lines = facts.text_of("/proc/net/route").splitlines()[1:]
    rows = [line.split() for line in lines]
    return frozenset(row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000")


def real_links() -> list[str]:
    """Links that lead out: not the loopback, and not those nobody has switched on."""
    if not _LINKS.is_dir():
        return []
    names = sorted(name for name in os.listdir(_LINKS) if name != "lo")
    routed = _default_links()
    return [
        name
        for name in names
        if name in routed or facts.text_of(_LINKS / name / "operstate") == "up"
    ]


def way_out() -> Outcome:
    """Another host can be reached at all, as far as this one can tell by itself."""
    links = real_links()
    if links:
        return yes(", ".join(links))
    return no(Cause.SETTING, "only the loopback: migrations stay on this host", "ip link; ip route")


def checks() -> list[Check]:
    """The rows about the network."""
    optional = Tier.OPTIONAL
    found = [
        Check("net-unix", "UNIX socket", optional, _GROUP, unix),
        Check(
            "net-tcp",
            "TCP over 127.0.0.1",
            optional,
            _GROUP,
            partial(loopback, socket.AF_INET, "127.0.0.1"),
        ),
        Check(
            "net-tcp6",
            "TCP over ::1",
            optional,
            _GROUP,
            partial(loopback, socket.AF_INET6, "::1"),
        ),
        Check("net-options", "TCP options", optional, _GROUP, tcp_options, "3.12"),
        Check("net-way-out", "a link to other hosts", optional, _GROUP, way_out),
    ]
    return found + [
        Check(f"net-link-{name}", f"link {name}", optional, _GROUP, partial(link, name))
        for name in real_links()
    ]
