"""From directory to directory: a receiver that counts pages gets the holes as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guest_hops import (
    Verb,
    block_file,
    finish_sending,
    manifest_of,
    park,
    send,
    start_verb,
    unpark,
    way,
)
from tests.support.guest_image import layout_for
from tests.support.guest_vm import BLOCK, GuestOptions, GuestVM
from tests.support.qemu import newer_qemu, require_qemu

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]


def test_a_parked_vm_with_holes_moves_into_another_directory(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    binary, options = newer_qemu() or require_qemu(), GuestOptions(layout_for(64 << 20))
    with GuestVM(binary, options) as source:
        source.serial.wait_passes(2)
        park(source, first, "postcopy", "unix")
    with way("unix", to_us=True) as way_:
        receiver, uri = start_verb("park", way_, str(second))
        with receiver, Verb("unpark", str(first), uri) as giver:
            giver.succeed()
            receiver.succeed()
    assert manifest_of(first)["state"] == "given"
    assert manifest_of(second)["state"] == "parked"
    for block in manifest_of(first)["blocks"]:
        there = block_file(second, block["idstr"])
        assert there.read_bytes() == (first / block["file"]).read_bytes(), block["idstr"]
    assert block_file(second, BLOCK).stat().st_blocks > 0
    with GuestVM(binary, options, incoming="defer") as target:
        unpark(second, target, "unix")
        target.assert_runs_clean()


def test_a_relay_gives_a_directory_every_page(tmp_path: Path) -> None:
    """Zeros too: the receiver counts, and would take the guest for incomplete without them."""
    directory = tmp_path / "vm"
    binary, options = newer_qemu() or require_qemu(), GuestOptions(layout_for(64 << 20))
    with (
        GuestVM(binary, options) as source,
        way("unix", to_us=True) as upstream,
        way("unix", to_us=True) as downstream,
    ):
        source.serial.wait_passes(2)
        receiver, there = start_verb("park", downstream, str(directory))
        with receiver:
            relay, here = start_verb("relay", upstream, there)
            with relay:
                send(source, here, "postcopy")
                relay.succeed()
                receiver.succeed()
        finish_sending(source)
    assert manifest_of(directory)["state"] == "parked"
    with GuestVM(binary, options, incoming="defer") as target:
        unpark(directory, target, "unix")
        target.assert_runs_clean()
