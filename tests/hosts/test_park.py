"""A stock QEMU's guest, parked on one host, given back to a stock QEMU on the other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts.conftest import Hosts
from tests.hosts.machines import PATIENCE_S, Host
from tests.hosts.migrations import PORT
from tests.hosts.units import Machine, Unit
from tests.support.guest_image import guest_image, layout_for
from tests.support.need import need
from tests.support.qemu import MIB

pytestmark = pytest.mark.timeout(1800)

# It checks all its memory itself, pass by pass, and says so on its serial port.
LAYOUT = layout_for(16 * MIB)
_ELF, _SERIAL, _PARKED = "/run/guest.elf", "/run/guest.serial", "/var/tmp/parked"


@contextmanager
def stock(host: Host, folder: Path, *arguments: str) -> Iterator[Machine]:
    """A stock QEMU with the checking guest, or waiting for it."""
    found = host.try_run("command -v qemu-system-x86_64").returncode == 0
    need(found, f"no QEMU on {host.name}", remedy="apt-get install qemu-system-x86, in the host")
    host.put(guest_image(LAYOUT), _ELF)
    host.run(f"rm -f {_SERIAL}")
    line = ["/usr/bin/qemu-system-x86_64", "-M", "pc-i440fx-7.2,memory-backend=pc.ram", "-m", "16M"]
    line += ["-object", f"memory-backend-ram,id=pc.ram,size={16 * MIB}"]
    line += ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    line += ["-kernel", _ELF, "-serial", f"file:{_SERIAL}", *arguments]
    with Machine(host, "qemu", line, folder) as machine:
        machine.connect().switch_on("postcopy-ram")
        yield machine


def wait_passes(host: Host, count: int) -> None:
    """Until the guest has said so often here that it went through its memory."""
    loop = f"until [ $(grep -c '^P ' {_SERIAL}) -ge {count} ]; do sleep 0.3; done"
    host.run(f"timeout {PATIENCE_S:g} sh -c {shlex.quote(loop)}")


def complaints(host: Host) -> str:
    """Wrong words it found."""
    return host.try_run(f"grep '^[BX]' {_SERIAL}").stdout


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_parked_here_given_back_there(hosts: Hosts, folder: Path, mode: str) -> None:
    source, destination = hosts.both
    source.run(f"rm -rf {_PARKED}")
    listen = f"tcp:127.0.0.1:{PORT}"
    verb = ["/usr/local/bin/postcopy", "park", "--listen", listen, _PARKED]
    with (
        stock(source, folder) as qemu,
        Unit(source, "park", verb) as park,
    ):
        wait_passes(source, 2)
        park.wait_log("listening on")
        slow = 1 << 20 if mode == "postcopy" else 1 << 30
        qemu.execute("migrate-set-parameters", max_bandwidth=slow, downtime_limit=5000)
        if mode == "precopy":
            qemu.execute("stop")  # QEMU 7.2 with TCG loses what a guest writes meanwhile
        qemu.execute("migrate", uri=listen)
        if mode == "postcopy":
            qemu.wait_status("active")
            qemu.execute("migrate-start-postcopy")
        qemu.wait_status("completed")
        park.wait_log("parked ")
        assert complaints(source) == ""
    with stock(destination, folder, "-incoming", "defer") as qemu:
        # A stock QEMU listens where it is told, without asking who comes.
        qemu.execute("migrate-incoming", uri=f"tcp:{destination.address}:{PORT}")
        words = ["postcopy", "unpark", _PARKED, f"tcp:{destination.address}:{PORT}", "--json"]
        said = json.loads(source.run(shlex.join(words)).splitlines()[-1])
        qemu.wait_status("completed")
        assert said["result"] == "ok", said
        # The first pass may have been begun at the source: the third has seen all pages here.
        wait_passes(destination, 3)
        assert qemu.run_state == "running"
        assert complaints(destination) == ""
    source.run(f"rm -rf {_PARKED}")
