"""A guest that checks all its memory goes from QEMU to QEMU by every way we offer.

Pairs of all values in the usual run; all combinations with ``POSTCOPY_INTEROP=full``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guest_hops import (
    block_file,
    finish_sending,
    listen,
    manifest_of,
    park,
    preempt_words,
    same_memory,
    send,
    start_verb,
    unpark,
    way,
)
from tests.support.guest_image import layout_for
from tests.support.guest_matrix import Case, cases
from tests.support.guest_vm import (
    BLOCK,
    GuestOptions,
    GuestVM,
    page_size_of,
)
from tests.support.need import need
from tests.support.qemu import QemuBinary, newer_qemu, require_qemu

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def binary_for(case: Case) -> QemuBinary:
    """Every other case has the newer QEMU, where there is one."""
    first = require_qemu()
    return (newer_qemu() or first) if cases().index(case) % 2 else first


def options_for(case: Case) -> GuestOptions:
    if case.backing == "hugetlb":
        count = 2 * (case.ram_bytes >> 21)
        need(
            POOL.exists() and int(POOL.read_text()) >= count,
            f"fewer than {count} free 2 MiB hugepages",
            remedy=f"python -m guestmem.hugepages reserve {count}",
        )
    return GuestOptions(layout_for(case.ram_bytes), backing=case.backing)


def page_size_words(case: Case) -> list[str]:
    return ["--page-size", f"{BLOCK}={page_size_of(case.backing) >> 10}K"]


def start_source(case: Case) -> GuestVM:
    """The guest after two passes; stopped where this QEMU would lose what it writes."""
    binary, options = binary_for(case), options_for(case)
    source = GuestVM(binary, options)
    try:
        source.serial.wait_passes(2)
        if binary.version < (9, 0):
            source.execute("stop")  # TCG of 7.2 loses dirty pages in precopy
    except BaseException:
        source.close()
        raise
    return source


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_guest_goes_through(case: Case, tmp_path: Path) -> None:
    """``completed`` at each source, ``running`` at each destination, and the guest finds no
    error."""
    if case.path == "relay":
        pass_through(case)
        return
    directory = tmp_path / "vm"
    with start_source(case) as source:
        result = park(source, directory, case.mode, case.transport)
        assert result["origin"] == ("precopy" if case.mode == "precopy" else "postcopy")
        same_memory(source, block_file(directory, BLOCK))
    bring_back(case, directory)
    assert manifest_of(directory)["state"] == "given"


def bring_back(case: Case, directory: Path) -> None:
    """Unpark; on the way ``again`` the running guest is parked once more, and comes back."""
    binary, options = binary_for(case), options_for(case)
    preempt = case.mode == "preempt"
    with GuestVM(binary, options, incoming="defer") as vm:
        words = page_size_words(case)
        unpark(directory, vm, case.transport, *words, preempt=preempt)
        vm.assert_runs_clean()
        if case.path != "again":
            return
        if binary.version < (9, 0):
            vm.execute("stop")
        second = directory.with_name("second")
        park(vm, second, case.mode, case.transport)
        same_memory(vm, block_file(second, BLOCK))
    with GuestVM(binary, options, incoming="defer") as vm:
        unpark(second, vm, case.transport, *words, preempt=preempt)
        vm.assert_runs_clean()


def pass_through(case: Case) -> None:
    """QEMU, us, QEMU: both connected at once."""
    binary, options = binary_for(case), options_for(case)
    preempt = case.mode == "preempt"
    with (
        start_source(case) as source,
        GuestVM(binary, options, incoming="defer") as target,
        way(case.transport, to_us=True) as upstream,
        way(case.transport, to_us=False) as downstream,
    ):
        there = listen(target, downstream, preempt=preempt)
        words = [*page_size_words(case), *(preempt_words(target) if preempt else [])]
        relay, here = start_verb("relay", upstream, there, *words, descriptors=downstream.ours)
        with relay:
            if upstream.descriptor >= 0:
                source.pass_descriptor("migration", upstream.descriptor)
            send(source, here, case.mode)
            relay.succeed()
            finish_sending(source)
        target.wait_status("completed")
        target.assert_runs_clean()
