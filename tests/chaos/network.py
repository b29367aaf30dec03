"""Two network namespaces with one shaped link between them, gone when their holders are.

The namespaces have no name: each lives as long as its holder, a process that waits for the end of
its standard input, and the processes inside. So nothing is left even if the test is killed. No
traffic ever touches the host's own namespace: the link is made from inside.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2 import NetNS, netns  # type: ignore[import-untyped]

from tests.support.need import need
from tests.support.process import tied_to_us

SOURCE, DESTINATION = "10.98.0.1", "10.98.0.2"
LINK = "wire"


class Namespace:
    """One network namespace and the process that keeps it. Ended by :meth:`close`."""

    def __init__(self, address: str) -> None:
        self.address = address
        argv = ["unshare", "--net", "--", "sh", "-c", "echo here && exec cat >/dev/null"]
        self._holder = subprocess.Popen(
            tied_to_us(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        came = self._holder.stdout.readline()
        need(came == b"here\n", "no network namespace can be made", remedy="run as root")
        self.path = f"/proc/{self._holder.pid}/ns/net"
        self.inode = os.stat(self.path).st_ino
        self.routes: Any = NetNS(self.path)

    @property
    def pid(self) -> int:
        """The holder's."""
        return self._holder.pid

    def new_socket(self, family: int) -> socket.socket:
        """A stream socket that belongs to this namespace, whoever uses it."""
        made: list[socket.socket] = []

        def make() -> None:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                netns.setns(fd)  # of this thread only, which ends at once
                made.append(socket.socket(family))
            finally:
                os.close(fd)

        thread = threading.Thread(target=make, name="enter-namespace")
        thread.start()
        thread.join()
        return made[0]

    def up(self, name: str) -> None:
        """Switch an interface on."""
        self.routes.link("set", index=self._index(name), state="up")

    def down(self, name: str) -> None:
        """Switch an interface off."""
        self.routes.link("set", index=self._index(name), state="down")

    def _index(self, name: str) -> int:
        return int(self.routes.link_lookup(ifname=name)[0])

    def dress(self, rate_bits: int) -> None:
        """Give the link's end here its address and its shape, and switch it on."""
        index = self._index(LINK)
        self.routes.addr("add", index=index, address=self.address, prefixlen=24)
        self.routes.tc(
            "add", "tbf", index=index, handle=0x10000, rate=f"{rate_bits}bit", burst=64 << 10,
            latency="50ms",
        )  # fmt: skip
        self.up("lo")
        self.up(LINK)

    def close(self) -> None:
        """End the holder; the namespace goes with the last process inside."""
        self.routes.close()
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait()


@dataclass
class Network:
    """Source and destination, and what can happen to the wire between them."""

    source: Namespace
    destination: Namespace

    def cut(self, at_source: bool) -> None:
        """Switch the link off at one end: the other loses its carrier, packets are lost."""
        (self.source if at_source else self.destination).down(LINK)

    def mend(self) -> None:
        """The link is on again at both ends; harmless if it was."""
        self.source.up(LINK)
        self.destination.up(LINK)


@contextlib.contextmanager
def network(rate_bits: int) -> Iterator[Network]:
    """Two namespaces and their link.

    :param rate_bits: what either direction carries, bits per second (tbf).
    """
    need(os.geteuid() == 0, "network namespaces need root", remedy="sudo -E python -m pytest")
    with contextlib.ExitStack() as stack:
        ends = []
        for address in (SOURCE, DESTINATION):
            ends.append(Namespace(address))
            stack.callback(ends[-1].close)
        here, there = ends
        here.routes.link(
            "add", ifname=LINK, kind="veth", peer={"ifname": LINK, "net_ns_pid": there.pid}
        )
        for end in ends:
            end.dress(rate_bits)
        yield Network(here, there)
