"""What goes wrong while a QEMU's guest is parked: the guest goes on at QEMU, or waits, or is here.

Never is there a directory that looks good and is not; never is a half lost that is still wanted.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.guest_hops import (
    Verb,
    block_file,
    finish_sending,
    manifest_of,
    nothing_left,
    park,
    same_memory,
    send,
    start_verb,
    unpark,
    way,
)
from tests.support.guest_image import layout_for
from tests.support.guest_vm import BLOCK, GuestOptions, GuestVM
from tests.support.need import need
from tests.support.proxy import Proxy
from tests.support.qemu import MIB, QemuBinary, qemu_binary, require_qemu
from tests.support.stream_elements import Kind, Phase
from tests.support.tamper import CutAt, StallAt, Tamper, kind, message

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

OPTIONS = GuestOptions(layout_for(32 * MIB))
FIRST_PAGE = kind(Kind.PAGE, Phase.PRECOPY)
SLOW = 4 << 20  # bytes per second of the postcopy phase, so that there is time to interrupt it


@contextmanager
def source_vm(binary: QemuBinary | None = None) -> Iterator[GuestVM]:
    """The guest, two passes old; stopped where this QEMU would lose what it writes."""
    binary = binary or require_qemu()
    with GuestVM(binary, OPTIONS) as vm:
        vm.serial.wait_passes(2)
        if binary.version < (9, 0):
            vm.execute("stop")
        yield vm


@contextmanager
def parking(
    directory: Path, *tampers: Tamper, words: tuple[str, ...] = ()
) -> Iterator[tuple[Verb, Proxy]]:
    """``park`` behind a proxy."""
    with way("unix", to_us=True) as way_:
        verb, uri = start_verb("park", way_, *words, str(directory))
        with verb, Proxy(uri, *tampers) as proxy:
            yield verb, proxy


def send_slowly(vm: GuestVM, verb: Verb, proxy: Proxy, mode: str) -> None:
    """Until the VM is in postcopy and half of the guest is ours."""
    vm.set_parameters(max_postcopy_bandwidth=SLOW)
    send(vm, proxy.uri, mode)
    verb.wait_text("device state is on disk")


def assert_goes_on(vm: GuestVM) -> None:
    """The source keeps its guest, in which nothing is wrong."""
    if vm.run_state() != "running":  # we had stopped it: its migration must not have started it
        vm.execute("cont")
    vm.assert_runs_clean()


# -- the source changes its mind, or dies ---------------------------------------


@pytest.mark.parametrize("nth", [0, 300], ids=["first-page", "middle"])
def test_cancelled_at_the_source(qemu_binary: QemuBinary, tmp_path: Path, nth: int) -> None:
    stall = StallAt(FIRST_PAGE, nth=nth)
    with source_vm(qemu_binary) as vm, parking(tmp_path / "vm", stall) as (verb, proxy):
        send(vm, proxy.uri, "precopy")
        assert stall.struck.wait(30)
        vm.execute("migrate_cancel")
        stall.go_on()
        # QEMU shuts its socket down before it notes that it was told to: either is its own word.
        vm.wait_status("cancelled", "failed")
        verb.fail("postcopy park:")
        nothing_left(tmp_path / "vm")
        assert_goes_on(vm)


def test_source_killed_in_precopy(tmp_path: Path) -> None:
    stall = StallAt(FIRST_PAGE, nth=200)
    with source_vm() as vm, parking(tmp_path / "vm", stall) as (verb, proxy):
        send(vm, proxy.uri, "precopy")
        assert stall.struck.wait(30)
        vm.kill()
        stall.go_on()
        verb.fail("postcopy park:")
        nothing_left(tmp_path / "vm")


def test_source_killed_in_postcopy_is_waited_for_then_given_up(tmp_path: Path) -> None:
    """The half that is here stays: whether the other half is gone for good only its owner knows."""
    words = ("--give-up-after", "0.2")
    with source_vm() as vm, parking(tmp_path / "vm", words=words) as (verb, proxy):
        send_slowly(vm, verb, proxy, "postcopy")
        vm.kill()
        verb.fail("Half of this guest is in", "--resume")
        assert not (tmp_path / "vm").exists()
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".vm.partial-")
        assert not (partial / "manifest.json").exists()


# -- the connection breaks ------------------------------------------------------


def test_cut_in_precopy(qemu_binary: QemuBinary, tmp_path: Path) -> None:
    cut = CutAt(FIRST_PAGE, nth=200, after=100)
    with source_vm(qemu_binary) as vm, parking(tmp_path / "vm", cut) as (verb, proxy):
        send(vm, proxy.uri, "precopy")
        vm.wait_status("failed")
        verb.fail("postcopy park:")
        nothing_left(tmp_path / "vm")
        assert_goes_on(vm)


@pytest.mark.parametrize("mode", ["postcopy", "preempt"])
def test_cut_in_postcopy_is_mended(qemu_binary: QemuBinary, tmp_path: Path, mode: str) -> None:
    """Paused at QEMU until ``migrate -r``; then the rest comes, and the park is whole."""
    directory = tmp_path / "vm"
    with source_vm(qemu_binary) as vm, parking(directory) as (verb, proxy):
        send_slowly(vm, verb, proxy, mode)
        proxy.cut()
        vm.wait_status("postcopy-paused")
        verb.wait_text("migrate -r")
        assert not directory.exists()
        vm.set_parameters(max_postcopy_bandwidth=0)
        vm.execute("migrate", uri=proxy.uri, resume=True)
        verb.succeed()
        finish_sending(vm)
        same_memory(vm, block_file(directory, BLOCK))
    bring_back(directory, qemu_binary)


def test_cut_before_the_source_is_told(tmp_path: Path) -> None:
    """All is on disk, and the source does not know: nobody may start it unasked."""
    cut = CutAt(message("SHUT"), after=0)
    directory = tmp_path / "vm"
    with source_vm() as vm, parking(directory, cut) as (verb, proxy):
        send(vm, proxy.uri, "precopy")
        vm.wait_status("failed", "completed")
        verb.wait()
        state = manifest_of(directory)["state"]
    # SHUT may have been in the socket before the cut: then we cannot know.
    assert state in ("unconfirmed", "parked")
    if state == "unconfirmed":
        with Verb("unpark", str(directory), "unix:/nowhere") as verb:
            verb.fail("unconfirmed", "--force")


def bring_back(directory: Path, binary: QemuBinary, *arguments: str) -> None:
    with GuestVM(binary, OPTIONS, incoming="defer") as vm:
        unpark(directory, vm, "unix", *arguments)
        vm.assert_runs_clean()


# -- we die, or are stopped -----------------------------------------------------


def test_park_killed_in_precopy(qemu_binary: QemuBinary, tmp_path: Path) -> None:
    """QEMU's guest runs on; what was left behind goes with the next park."""
    directory = tmp_path / "vm"
    stall = StallAt(FIRST_PAGE, nth=200)
    with source_vm(qemu_binary) as vm:
        with parking(directory, stall) as (verb, proxy):
            send(vm, proxy.uri, "precopy")
            assert stall.struck.wait(30)
            verb.kill()
            proxy.cut()
            vm.wait_status("failed")
        assert not directory.exists()
        assert len(list(tmp_path.iterdir())) == 1
        assert_goes_on(vm)
        vm.execute("stop")
        park(vm, directory, "precopy", "unix")
        assert [path.name for path in tmp_path.iterdir()] == ["vm"]


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_park_ended_in_postcopy_goes_on_with_resume(
    qemu_binary: QemuBinary, tmp_path: Path, how: str
) -> None:
    """The device state survived on disk; QEMU still has all of RAM."""
    directory = tmp_path / "vm"
    with source_vm(qemu_binary) as vm:
        with parking(directory) as (verb, proxy):
            send_slowly(vm, verb, proxy, "postcopy")
            if how == "kill":
                verb.kill()
                proxy.cut()
            else:
                verb.process.terminate()
                proxy.cut()
                verb.wait()
                assert verb.process.returncode != 0
            vm.wait_status("postcopy-paused")
        assert not directory.exists()
        vm.set_parameters(max_postcopy_bandwidth=0)
        with way("unix", to_us=True) as way_:
            again, uri = start_verb("park", way_, "--resume", str(directory))
            with again:
                vm.execute("migrate", uri=uri, resume=True)
                again.succeed()
        finish_sending(vm)
        same_memory(vm, block_file(directory, BLOCK))
        assert [path.name for path in tmp_path.iterdir()] == ["vm"]
    bring_back(directory, qemu_binary)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with Verb("park", "--resume", "--listen", f"unix:{tmp_path}/s", str(tmp_path / "vm")) as verb:
        verb.fail("nothing to resume")


# -- the disk is full -------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; a third of the guest."""
    need(os.geteuid() == 0, "mounting a small file system needs root", remedy="run as root")
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    need(done.returncode == 0, f"no tmpfs can be mounted: {done.stderr.decode()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_in_precopy(qemu_binary: QemuBinary, small_disk: Path) -> None:
    directory = small_disk / "vm"
    with source_vm(qemu_binary) as vm, parking(directory) as (verb, proxy):
        send(vm, proxy.uri, "precopy")
        verb.fail("No space left on device")
        vm.wait_status("failed")
        nothing_left(directory)
        assert_goes_on(vm)


def test_full_disk_in_postcopy_waits_for_room(qemu_binary: QemuBinary, small_disk: Path) -> None:
    """The guest is paused at QEMU; with more room it goes on where it was."""
    directory = small_disk / "vm"
    with source_vm(qemu_binary) as vm, parking(directory) as (verb, proxy):
        send(vm, proxy.uri, "postcopy")
        vm.wait_status("postcopy-paused")
        verb.wait_text("No space left on device")
        assert not directory.exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        vm.execute("migrate", uri=proxy.uri, resume=True)
        verb.succeed()
        finish_sending(vm)
        same_memory(vm, block_file(directory, BLOCK))
    bring_back(directory, qemu_binary)


# -- what cannot work is said at once ---------------------------------------------


def test_existing_directory_is_left_alone(tmp_path: Path) -> None:
    with Verb("park", "--listen", f"unix:{tmp_path}/s", str(tmp_path)) as verb:
        verb.fail("exists already")


def test_one_way_pipe_with_postcopy_is_refused(tmp_path: Path) -> None:
    """A return path cannot be had over a pipe: said before the first page."""
    read_end, write_end = os.pipe()
    with source_vm() as vm:
        verb = Verb(
            "park", "--listen", f"fd:{read_end}", str(tmp_path / "vm"), descriptors=(read_end,)
        )
        with verb:
            os.close(read_end)
            vm.pass_descriptor("pipe", write_end)
            os.close(write_end)
            vm.set_capabilities("postcopy-ram")
            vm.execute("migrate", uri="fd:pipe")
            vm.wait_status("failed")
            verb.fail("postcopy park:")
        nothing_left(tmp_path / "vm")
        assert_goes_on(vm)


def test_pipe_with_precopy_is_taken_with_a_warning(tmp_path: Path) -> None:
    """What the source believes then is said."""
    read_end, write_end = os.pipe()
    directory = tmp_path / "vm"
    with source_vm() as vm:
        verb = Verb("park", "--listen", f"fd:{read_end}", str(directory), descriptors=(read_end,))
        with verb:
            os.close(read_end)
            vm.pass_descriptor("pipe", write_end)
            os.close(write_end)
            vm.set_capabilities()
            vm.execute("migrate", uri="fd:pipe")
            verb.succeed()
            assert "no return path" in verb.said
            vm.wait_status("completed")
    assert manifest_of(directory)["state"] == "parked"
