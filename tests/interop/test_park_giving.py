"""Giving back: states, clones, page sizes, capabilities, records, and what if it breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.guest_hops import (
    Verb,
    listen,
    manifest_of,
    park,
    preempt_words,
    unpark,
    way,
)
from tests.support.guest_image import GuestLayout, layout_for
from tests.support.guest_vm import BLOCK, GuestOptions, GuestVM
from tests.support.need import need
from tests.support.proxy import Proxy
from tests.support.qemu import MIB, PAGE_BYTES, QemuBinary, qemu_binary, require_qemu
from tests.support.stream_elements import Kind, Phase
from tests.support.tamper import CutAt, StallAt, kind, message

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

OPTIONS = GuestOptions(layout_for(32 * MIB))
HUGE = GuestOptions(layout_for(32 * MIB), backing="hugetlb")
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parked VM; tests give clones of it, or of a copy."""
    directory = tmp_path_factory.mktemp("parked") / "vm"
    with GuestVM(require_qemu(), OPTIONS) as vm:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        park(vm, directory, "precopy", "unix")
    return directory


@pytest.fixture
def parked(template: Path, tmp_path: Path) -> Path:
    """A copy of the template, by the ordinary means: files are all there is."""
    directory = tmp_path / "vm"
    directory.mkdir()
    for file in template.iterdir():
        with open(file, "rb") as old, open(directory / file.name, "wb") as new:
            new.write(old.read())  # holes become zeros: the checksums must not care
    return directory


@contextmanager
def target_vm(
    binary: QemuBinary | None = None, options: GuestOptions = OPTIONS, *, paused: bool = False
) -> Iterator[GuestVM]:
    with GuestVM(binary or require_qemu(), options, incoming="defer", paused=paused) as vm:
        yield vm


# -- one guest, one side --------------------------------------------------------


def test_given_once(parked: Path) -> None:
    with target_vm() as vm:
        unpark(parked, vm, "unix")
        vm.assert_runs_clean()
    assert manifest_of(parked)["state"] == "given"
    with Verb("unpark", str(parked), "unix:/nowhere") as verb:
        verb.fail("is given, not parked", "--clone")


@pytest.mark.parametrize("asks", ["at once", "later"])
def test_the_last_word_is_lost(parked: Path, asks: str) -> None:
    """The destination has everything and says so to nobody but its monitor."""
    cut = CutAt(message("SHUT"), after=0)
    with target_vm() as vm, way("unix", to_us=False) as way_:
        monitor = ("--qmp", f"unix:{vm.monitor}")
        with Proxy(listen(vm, way_), cut) as proxy:
            words = (*monitor,) if asks == "at once" else ()
            with Verb("unpark", *words, str(parked), proxy.uri) as verb:
                if asks == "at once":
                    assert verb.succeed()["state"] == "given"
                else:
                    verb.fail("only its last word is missing", "unpark --resume --qmp SOCKET")
                    assert manifest_of(parked)["state"] == "giving"
        vm.wait_status("completed")
        if asks == "later":
            with Verb("unpark", "--resume", *monitor, str(parked), way_.connect) as verb:
                assert verb.succeed() == {"result": "ok", "state": "given"}
        assert cut.hits == 1
        vm.assert_runs_clean()
    assert manifest_of(parked)["state"] == "given"


def test_clones_leave_it_parked(parked: Path) -> None:
    """Two guests from one directory, at once."""
    with target_vm() as one, target_vm() as two:
        for vm in (one, two):
            unpark(parked, vm, "unix", "--clone", "--force")
        for vm in (one, two):
            vm.assert_runs_clean()
    manifest = manifest_of(parked)
    assert (manifest["state"], manifest["clones"]) == ("parked", 2)


def test_a_clone_of_a_vm_with_disks_needs_force(parked: Path) -> None:
    with Verb("unpark", "--clone", str(parked), "unix:/nowhere") as verb:
        verb.fail("two guests on one disk", "--force")


def test_a_paused_guest_is_said_to_be_one(parked: Path) -> None:
    """RUN starts it whatever it was; -S at the destination keeps it."""
    assert manifest_of(parked)["run_state"] == "paused"
    with target_vm(paused=True) as vm, way("unix", to_us=False) as way_:
        with Verb("unpark", str(parked), listen(vm, way_)) as verb:
            verb.succeed()
            assert "-S" in verb.said
        vm.wait_status("completed")
        assert vm.run_state() == "paused"
        vm.execute("cont")
        vm.assert_runs_clean()


def test_damage_is_found_before_anything_is_given(parked: Path) -> None:
    """--verify sums all of RAM; device state is always checked."""
    with open(parked / "ram-0.bin", "r+b") as file:
        file.seek(5 * MIB)
        byte = file.read(1)
        file.seek(5 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    with (
        target_vm() as vm,
        way("unix", to_us=False) as way_,
        Verb("unpark", "--verify", str(parked), listen(vm, way_)) as verb,
    ):
        verb.fail("is damaged: its checksum is wrong")
    assert manifest_of(parked)["state"] == "parked"
    with open(parked / "devices.bin", "r+b") as file:
        file.write(b"\xff")
    with Verb("unpark", str(parked), "unix:/nowhere") as verb:
        verb.fail("devices.bin is damaged")


# -- page sizes and capabilities -------------------------------------------------


def needs_hugepages() -> None:
    need(
        POOL.exists() and int(POOL.read_text()) >= 16,
        "fewer than 16 free 2 MiB hugepages",
        remedy="python -m guestmem.hugepages reserve 16",
    )


def test_page_sizes_are_learned_from_the_monitor(qemu_binary: QemuBinary, parked: Path) -> None:
    """Parked with 4 KiB pages, given to a QEMU with 2 MiB ones; it is prepared, too."""
    needs_hugepages()
    with target_vm(qemu_binary, HUGE) as vm, way("unix", to_us=False) as way_:
        vm.set_capabilities()
        words = ("--qmp", f"unix:{vm.monitor}")
        with Verb("unpark", str(parked), way_.listen, *words) as verb:
            verb.succeed()
        vm.wait_status("completed")
        vm.assert_runs_clean()


def test_a_page_size_that_contradicts_the_monitor_is_refused(parked: Path) -> None:
    with target_vm() as vm, way("unix", to_us=False) as way_:
        words = ("--qmp", f"unix:{vm.monitor}", "--page-size", f"{BLOCK}=2M")
        with Verb("unpark", str(parked), way_.listen, *words) as verb:
            verb.fail("the destination's block has pages of 4K", "leave --page-size out")
    assert manifest_of(parked)["state"] == "parked"


def test_a_wrong_page_size_is_guessed_at(parked: Path) -> None:
    """A stock QEMU just exits; our message says what to try."""
    needs_hugepages()
    with target_vm(options=HUGE) as vm, way("unix", to_us=False) as way_:
        with Verb("unpark", str(parked), listen(vm, way_)) as verb:
            verb.fail("--page-size", "still parked")
        assert vm.wait_exit() != 0
        assert "page sizes" in vm.stderr()
    assert manifest_of(parked)["state"] == "parked"


def test_a_block_that_is_not_there_is_refused(parked: Path) -> None:
    with Verb("unpark", str(parked), "unix:/nowhere", "--page-size", "ram=2M") as verb:
        verb.fail("the VM has", BLOCK)


def test_preempt_is_learned_from_the_monitor(qemu_binary: QemuBinary, parked: Path) -> None:
    """The capability is on at the destination: we open the second channel without being told."""
    with target_vm(qemu_binary) as vm, way("unix", to_us=False) as way_:
        vm.set_capabilities("postcopy-ram", "postcopy-preempt")
        words = ("--qmp", f"unix:{vm.monitor}")
        with Verb("unpark", str(parked), way_.listen, *words) as verb:
            verb.succeed()
        vm.wait_status("completed")
        vm.assert_runs_clean()


def test_preempt_over_one_channel_is_refused(parked: Path) -> None:
    with Verb("unpark", str(parked), "exec:true", "--preempt") as verb:
        verb.fail("preempt needs tcp or unix")


# -- one-way destinations ---------------------------------------------------------


def test_a_deaf_command_is_refused(parked: Path) -> None:
    """It takes everything and answers nothing: nothing was given away."""
    with Verb("unpark", str(parked), "exec:cat >/dev/null") as verb:
        verb.fail("one-way", "still parked")
    assert manifest_of(parked)["state"] == "parked"


def test_a_file_is_refused(parked: Path, tmp_path: Path) -> None:
    with Verb("unpark", str(parked), f"file:{tmp_path}/out") as verb:
        verb.fail("one-way")
    assert manifest_of(parked)["state"] == "parked"


# -- devices that look at RAM -----------------------------------------------------

# The firmware sets its queue up and has no reason to use it: the ring of used buffers is a page of
# zeros, which virtio's load reads.
DISK = ("-drive", "if=none,id=disk,driver=null-co,size=64M", "-device", "virtio-blk-pci,drive=disk")
WITH_DISK = GuestOptions(GuestLayout(256 * MIB, stride=MIB), args=DISK)


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_devices_may_want_zero_pages_when_all_others_are_there(
    qemu_binary: QemuBinary, tmp_path: Path, preempt: bool
) -> None:
    """The last thing pushed is long there, and a device's load still asks: zero pages are never
    pushed, and behind the end of the stream nobody could answer."""
    directory = tmp_path / "vm"
    with GuestVM(qemu_binary, WITH_DISK) as vm:
        vm.serial.wait_passes(2)
        vm.execute("stop")
        park(vm, directory, "precopy", "unix")
    last_page = StallAt(kind(Kind.PAGE, Phase.POSTCOPY), nth=full_pages(directory) - 1)
    request = StallAt(lambda e: e.name.startswith("REQ_PAGES"), after=0)
    with target_vm(qemu_binary, WITH_DISK) as vm, way("unix", to_us=False) as way_:
        uri = listen(vm, way_, preempt=preempt)
        words = preempt_words(vm) if preempt else []
        proxy = Proxy(uri, request, last_page)
        with proxy, Verb("unpark", str(directory), proxy.uri, *words) as verb:
            for stall in (request, last_page):
                assert stall.struck.wait(60), (proxy.names, verb.said)
            last_page.go_on()
            request.go_on()
            verb.succeed()
        vm.wait_status("completed")
        vm.assert_runs_clean()


def full_pages(directory: Path) -> int:
    """Pages of all blocks that are not zero."""
    count, zero = 0, bytes(PAGE_BYTES)
    for block in manifest_of(directory)["blocks"]:
        with open(directory / block["file"], "rb") as file:
            while page := file.read(PAGE_BYTES):
                count += page != zero
    return count


# -- when it breaks ---------------------------------------------------------------


def test_nobody_listens(parked: Path) -> None:
    with Verb("unpark", str(parked), f"unix:{parked}/nobody") as verb:
        verb.fail("Failed to connect")
    assert manifest_of(parked)["state"] == "parked"


def test_another_machine_type_is_refused_and_it_stays_parked(parked: Path) -> None:
    other = GuestOptions(layout_for(32 * MIB), machine="pc-i440fx-6.2")
    with target_vm(options=other) as vm, way("unix", to_us=False) as way_:
        with Verb("unpark", str(parked), listen(vm, way_)) as verb:
            verb.fail("still parked")
        assert vm.wait_exit() != 0
    assert manifest_of(parked)["state"] == "parked"


@pytest.mark.parametrize("how", ["cut", "kill", "terminate"])
@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_broken_after_the_guest_ran_it_is_resumed(
    qemu_binary: QemuBinary, parked: Path, how: str, preempt: bool
) -> None:
    """Another process takes it up: the files have all pages, the manifest the rest."""
    with target_vm(qemu_binary) as vm:
        with way("unix", to_us=False) as way_:
            uri = listen(vm, way_, preempt=preempt)
            words = ["--on-demand-only", "60", *(preempt_words(vm) if preempt else [])]
            with Proxy(uri) as proxy, Verb("unpark", str(parked), proxy.uri, *words) as verb:
                vm.qmp.wait_event("RESUME")
                verb.wait_text("postcopy-active")
                if how == "cut":
                    proxy.cut()
                    verb.fail("postcopy-paused", "--resume")
                elif how == "kill":
                    verb.kill()
                else:
                    verb.process.terminate()
                    assert verb.wait() != 0
                vm.wait_status("postcopy-paused")
        assert manifest_of(parked)["state"] == "giving"
        with Verb("unpark", str(parked), "unix:/nowhere") as verb:
            verb.fail("giving, not parked", "--resume")
        resume(vm, parked, preempt)
        vm.assert_runs_clean()
    assert manifest_of(parked)["state"] == "given"


def resume(vm: GuestVM, directory: Path, preempt: bool) -> None:
    """By --qmp, which tells the destination to listen again."""
    with way("unix", to_us=False) as way_:
        words = ["--resume", "--qmp", f"unix:{vm.monitor}"]
        with Verb("unpark", *words, str(directory), way_.listen) as verb:
            verb.succeed()
        vm.wait_status("completed")


def test_destination_killed_while_pages_are_missing(parked: Path) -> None:
    """We cannot know that nobody has it; the user can."""
    with target_vm() as vm, way("unix", to_us=False) as way_:
        uri = listen(vm, way_)
        with Verb("unpark", str(parked), uri, "--on-demand-only", "60") as verb:
            vm.qmp.wait_event("RESUME")
            verb.wait_text("postcopy-active")
            vm.kill()
            verb.fail("--resume")
    assert manifest_of(parked)["state"] == "giving"
    with target_vm() as vm:
        unpark(parked, vm, "unix", "--force")
        vm.assert_runs_clean()


# -- working sets ------------------------------------------------------------------


def test_a_recorded_start_cuts_the_faults_of_the_next(parked: Path, tmp_path: Path) -> None:
    """On demand only, so that every page of the working set is asked for; then pushed first."""
    record = tmp_path / "first.ws"
    with target_vm() as vm:
        words = ("--clone", "--force", "--on-demand-only", "1.5")
        first = unpark(parked, vm, "unix", *words, "--record", str(record))
        vm.assert_runs_clean()
    head, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert head["requests"] == len(lines) == first["page_requests"] > 0
    assert {line["block"] for line in lines} >= {BLOCK}
    with target_vm() as vm:
        second = unpark(parked, vm, "unix", "--clone", "--force", "--prefetch", str(record))
        vm.assert_runs_clean()
    assert second["page_requests"] < first["page_requests"] / 2


def test_a_record_of_another_vm_is_refused(parked: Path, tmp_path: Path) -> None:
    """Before anything is sent: the destination waits for its guest still."""
    record = tmp_path / "other.ws"
    record.write_text(
        '{"kind": "postcopy working set", "format": 1, "requests": 1}\n'
        '{"block": "nobody", "offset": 0, "length": 4096, "us": 1}\n'
    )
    with target_vm() as vm, way("unix", to_us=False) as way_:
        uri = listen(vm, way_)
        with Verb("unpark", str(parked), uri, "--prefetch", str(record)) as verb:
            verb.fail("no working-set record of this VM")
        assert manifest_of(parked)["state"] == "parked"
        with Verb("unpark", str(parked), uri) as verb:
            verb.succeed()
        vm.wait_status("completed")


def test_a_record_that_cannot_be_written_costs_nothing_else(parked: Path) -> None:
    """The guest is given, whatever becomes of the notes about it; and the directory says so."""
    with target_vm() as vm, way("unix", to_us=False) as way_:
        with Verb("unpark", str(parked), listen(vm, way_), "--record", "/dev/full") as verb:
            verb.succeed()
            assert "No space left on device" in verb.said
        vm.wait_status("completed")
    assert manifest_of(parked)["state"] == "given"
