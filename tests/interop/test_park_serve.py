"""A guest that is still on its way is read by another process, page by page, on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from migration.park.view import View, ViewError
from tests.support.guest_hops import (
    block_file,
    finish_sending,
    manifest_of,
    same_memory,
    send,
    start_verb,
    unpark,
    way,
)
from tests.support.guest_image import layout_for
from tests.support.guest_vm import BLOCK, GuestOptions, GuestVM
from tests.support.monitor_process import ROOT
from tests.support.proxy import Proxy
from tests.support.qemu import MIB, PAGE_BYTES, QemuBinary, qemu_binary, require_qemu

__all__ = ["qemu_binary"]

pytestmark = [pytest.mark.interop, pytest.mark.kernel]

OPTIONS = GuestOptions(layout_for(32 * MIB))
CRAWL = 1 << 20  # bytes per second: the background would take half a minute
FAR = 24 * MIB  # an offset the background is long from


def expected(vm: GuestVM, offset: int, length: int) -> bytes:
    return vm.read_ram(offset, length)


def test_a_page_is_had_long_before_its_turn(qemu_binary: QemuBinary, tmp_path: Path) -> None:
    """Asked for at the source, in postcopy; afterwards the park is as good as any."""
    directory, socket_path = tmp_path / "vm", tmp_path / "view"
    with GuestVM(qemu_binary, OPTIONS) as vm, way("unix", to_us=True) as way_:
        vm.serial.wait_passes(2)
        if qemu_binary.version < (9, 0):
            vm.execute("stop")
        verb, uri = start_verb("park", way_, "--serve", str(socket_path), str(directory))
        with verb:
            vm.set_parameters(max_postcopy_bandwidth=CRAWL)
            send(vm, uri, "postcopy")
            verb.wait_text("device state is on disk")
            with View(socket_path) as view:
                assert view.machine == OPTIONS.machine
                block = view[BLOCK]
                assert block.length == 32 * MIB
                # Backwards: from a requested page on QEMU goes on upwards by itself.
                for at in range(FAR, FAR - 16 * MIB, -2 * MIB):
                    assert block.read(at, PAGE_BYTES) == expected(vm, at, PAGE_BYTES)
                assert vm.query_migrate()["ram"]["postcopy-requests"] >= 8
                assert not view.wait(0)
                vm.set_parameters(max_postcopy_bandwidth=0)
                assert view.wait(60)
                # Complete: nothing sleeps any more, also what came as zero or never.
                got = block.read(MIB, 31 * MIB)
            verb.succeed()
            finish_sending(vm)
            assert got == expected(vm, MIB, 31 * MIB)
            same_memory(vm, block_file(directory, BLOCK))
    assert not socket_path.exists()
    with GuestVM(qemu_binary, OPTIONS, incoming="defer") as vm:
        unpark(directory, vm, "unix")
        vm.assert_runs_clean()


def test_several_readers_from_the_first_page_on(tmp_path: Path) -> None:
    """Connected before the source is, they wait for what is not there; in postcopy it is asked
    for. What came as zero is zero to all."""
    directory, socket_path = tmp_path / "vm", tmp_path / "view"
    with GuestVM(require_qemu(), OPTIONS) as vm, way("unix", to_us=True) as way_:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        verb, uri = start_verb("park", way_, "--serve", str(socket_path), str(directory))
        with verb:
            vm.set_capabilities("postcopy-ram")
            vm.set_parameters(max_bandwidth=CRAWL, max_postcopy_bandwidth=CRAWL)
            with ThreadPoolExecutor(2) as pool:
                opening = [pool.submit(View, socket_path) for _ in range(2)]
                vm.execute("migrate", uri=uri)
                views = [each.result(60) for each in opening]
            vm.wait_status("active")
            with views[0] as one, views[1] as two:
                got: dict[str, bytes] = {}
                readers = [
                    threading.Thread(
                        target=lambda v=v, n=n: got.update({n: v[BLOCK].read(FAR, 8192)})
                    )
                    for n, v in (("one", one), ("two", two))
                ]
                for reader in readers:
                    reader.start()
                assert not got  # the precopy phase alone would take half a minute
                vm.execute("migrate-start-postcopy")
                for reader in readers:
                    reader.join(30)
                assert got["one"] == got["two"] == expected(vm, FAR, 8192)
                vm.set_parameters(max_postcopy_bandwidth=0)
                assert one.wait(60)
                assert two.wait(60)
                assert one[BLOCK].read(3 * MIB, PAGE_BYTES) == bytes(PAGE_BYTES)
            verb.succeed()
    assert manifest_of(directory)["state"] == "parked"


def test_a_broken_park_gives_readers_no_invented_page(tmp_path: Path) -> None:
    """What never comes ends in SIGBUS, not in zeros; a reader that waits learns why."""
    socket_path = tmp_path / "view"
    reader = (
        "import sys; from migration.park.view import View\n"
        "view = View(sys.argv[1]); print('reading', flush=True)\n"
        f"view[{BLOCK!r}].read({FAR}, 4096)\n"
        "print('read')\n"
    )
    with GuestVM(require_qemu(), OPTIONS) as vm, way("unix", to_us=True) as way_:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        words = ("--serve", str(socket_path), "--give-up-after", "0")
        verb, uri = start_verb("park", way_, *words, str(tmp_path / "vm"))
        with verb, Proxy(uri) as proxy:
            vm.set_parameters(max_postcopy_bandwidth=CRAWL)
            # Requests do not get through: nobody reads them any more once this is stopped.
            send(vm, proxy.uri, "postcopy")
            verb.wait_text("device state is on disk")
            with View(socket_path) as view:
                os.kill(vm.process.pid, signal.SIGSTOP)
                child = subprocess.Popen(
                    [sys.executable, "-c", reader, str(socket_path)],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                with child:
                    assert child.stdout is not None
                    assert child.stdout.readline() == b"reading\n"
                    proxy.cut()
                    assert child.wait(30) == -signal.SIGBUS
                    assert child.stdout.read() == b""
                with pytest.raises(ViewError, match="never comes"):
                    view.wait(30)
            os.kill(vm.process.pid, signal.SIGCONT)
            verb.fail("Half of this guest is in")


def test_nobody_shows_anything(tmp_path: Path) -> None:
    with pytest.raises(ViewError, match="No such file"):
        View(tmp_path / "nobody")
