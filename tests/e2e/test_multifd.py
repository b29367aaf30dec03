"""Multifd channels between two of our own ends: RAM over several connections, then as ever."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from guestmem import Backing, RAMBlock
from migration.runtime.channel import Channel
from migration.runtime.destination import side as incoming_side
from migration.runtime.destination.gather import gather
from migration.runtime.errors import MigrationError
from migration.runtime.transport import Listener
from tests.support.e2e_leaks import nothing_left
from tests.support.flip import FlippingRelay
from tests.support.pair import MIB, Side, pair, side
from tests.support.qemu import PAGE_BYTES
from tests.support.steps import Steps, UntilPostcopy
from tests.support.toyvm_machines import until
from tests.support.uffd_memory import hugepages

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]


def listen(target: Side, transport: str, folder: Path) -> str:
    uri = f"unix:{folder}/m" if transport == "unix" else "tcp:127.0.0.1:0"
    return target.service.migrate_incoming(uri)


def switch_on(*sides: Side, channels: int = 2, **parameters: Any) -> None:
    for each in sides:
        each.service.set_capabilities({"multifd": True})
        each.service.set_parameters({"multifd-channels": channels, **parameters})


def ram_of(side_: Side) -> dict[str, Any]:
    info = side_.service.query()["ram"]
    assert isinstance(info, dict)
    return info


def finish(source: Side, target: Side) -> None:
    assert source.service.wait(60) == "completed", source.service.query()
    assert target.service.wait(60) == "completed", target.service.query()
    target.assert_sweep_clean()


def names_of_threads(part: str) -> set[str]:
    return {thread.name for thread in threading.enumerate() if part in thread.name}


@pytest.mark.parametrize("checksum", [True, False], ids=["checksums", "plain"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_precopy(channels: int, transport: str, checksum: bool, tmp_path: Path) -> None:
    """A guest that writes all the time; every channel carries a part of it."""
    with pair(postcopy=False, ram_bytes=32 * MIB, rate=20_000) as (source, target):
        switch_on(source, target, channels=channels)
        source.service.set_parameters({"x-checksum": checksum})
        uri = listen(target, transport, tmp_path)
        source.machine.start()
        source.service.migrate(uri)
        finish(source, target)
        ram = ram_of(source)
        sent = source.figures["multifd-channel-bytes"]
        assert len(sent) == channels
        assert all(each > 100_000 for each in sent)
        assert sum(sent) == ram["multifd-bytes"]
        # Hardly anything but records' ends and devices is left for the main channel.
        assert ram["multifd-bytes"] > ram["normal-bytes"]
        assert ram["transferred"] - ram["multifd-bytes"] < 1 * MIB
        assert target.figures["multifd-channel-bytes"] == sent
        assert not names_of_threads("multifd")


def begin(source: Side, target: Side, folder: Path) -> None:
    uri = listen(target, "unix", folder)
    source.machine.start()
    source.service.migrate(uri)


@pytest.mark.parametrize("checksum", [True, False], ids=["checksums", "plain"])
@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_postcopy_after_it(backing: Backing, preempt: bool, checksum: bool, tmp_path: Path) -> None:
    """/migration/multifd+postcopy/{plain,preempt}: precopy over the channels, then the main channel
    alone, and not one page is lost or comes twice between the two."""
    with pair(ram_bytes=32 * MIB, backing=backing, rate=20_000) as (source, target):
        switch_on(source, target, channels=3)
        for each in (source, target):
            each.service.set_capabilities({"postcopy-preempt": preempt})
        source.service.set_parameters({"x-checksum": checksum})
        source.service.policy = UntilPostcopy()
        begin(source, target, tmp_path)
        source.wait_event("MIGRATION_PASS", **{"pass": 2})  # all of RAM went over the channels
        source.service.start_postcopy()
        finish(source, target)
        ram = ram_of(source)
        assert ram["multifd-bytes"] > ram["postcopy-bytes"] > 0
        assert source.figures["postcopy-pages"] > 0
        assert target.figures["missing-pages"] == 0


@pytest.mark.parametrize("begun", [False, True], ids=["at-once", "after-a-pass"])
def test_postcopy_paused_goes_on_without_the_channels(begun: bool, tmp_path: Path) -> None:
    """Cut in postcopy: the recovery is of the main channel alone, twice."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        switch_on(source, target, channels=4)
        source.service.set_parameters(
            {"max-bandwidth": 0 if begun else MIB, "max-postcopy-bandwidth": 2 * MIB}
        )
        source.service.policy = UntilPostcopy()
        begin(source, target, tmp_path)
        if begun:
            source.wait_event("MIGRATION_PASS", **{"pass": 1})
        source.service.set_parameters({"x-hold-background": True})
        source.service.start_postcopy()
        target.wait_event("RESUME")
        for cut in range(2):
            for each in (source, target):
                each.wait_count("MIGRATION", cut + 1, status="postcopy-active")
            (source if cut else target).service.pause()
            for each in (source, target):
                each.wait_count("MIGRATION", cut + 1, status="postcopy-paused")
            again = target.service.recover(f"unix:{tmp_path}/again{cut}")
            source.service.migrate(again, resume=True)
        for each in (source, target):
            each.wait_count("MIGRATION", 3, status="postcopy-active")
        source.service.set_parameters({"x-hold-background": False, "max-postcopy-bandwidth": 0})
        finish(source, target)


def test_zero_pages_that_were_data(tmp_path: Path) -> None:
    """Pages that went out as data are zero in a later pass, and data again, and all arrive so."""
    steps = Steps()
    with pair(postcopy=False, ram_bytes=16 * MIB, smp=0, ring_pages=0) as (source, target):
        switch_on(source, target, channels=3)
        source.service.policy = steps
        block, taken = next(iter(source.machine.ram)), next(iter(target.machine.ram))
        begin(source, target, tmp_path)
        for number in range(1, 9):
            steps.wait()
            write_pages(block, number)
            if number < 8:
                steps.go_on()
        expected = block.read(0, block.used_length)
        steps.finish()  # the last ones go out while the guest stands
        finish_quietly(source, target)
        assert taken.read(0, block.used_length) == expected
        assert ram_of(source)["duplicate"] > 2 * block.used_length // PAGE_BYTES


def write_pages(block: RAMBlock, number: int) -> None:
    """Every second or third page: zero, or other data than before."""
    data = bytes(PAGE_BYTES) if number % 3 else bytes([number]) * PAGE_BYTES
    for index in range(number % 2, block.used_length // PAGE_BYTES, 2 + number % 2):
        block.write(index * PAGE_BYTES, data)


def finish_quietly(source: Side, target: Side) -> None:
    """Without the oracle: it does not know what the test wrote."""
    assert source.service.wait(60) == "completed", source.service.query()
    assert target.service.wait(60) == "completed", target.service.query()


@pytest.mark.parametrize("how", ["none", "legacy", "multifd"])
def test_zero_page_detection(how: str, tmp_path: Path) -> None:
    """As data, as records of the main channel, or in the packets."""
    with pair(postcopy=False, ram_bytes=64 * MIB, fill_share=0.5, rate=500) as (source, target):
        settings: dict[str, Any] = {"zero-page-detection": how, "x-sparse": False}
        switch_on(source, target, **settings)
        begin(source, target, tmp_path)
        finish(source, target)
        ram = ram_of(source)
        assert (ram["duplicate"] == 0) is (how == "none")
        # 9 bytes for each of them, or devices alone.
        records = ram["transferred"] - ram["multifd-bytes"]
        assert (records > 9 * 8000) is (how == "legacy"), ram


def test_without_multifd_none_means_none(tmp_path: Path) -> None:
    """zero-page-detection is not the channels' alone."""
    with pair(postcopy=False, ram_bytes=8 * MIB, fill_share=0.5, rate=500) as (source, target):
        source.service.set_parameters({"zero-page-detection": "none", "x-sparse": False})
        begin(source, target, tmp_path)
        finish(source, target)
        assert ram_of(source)["duplicate"] == 0


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_holes_are_told_of_before_any_page(postcopy: bool, tmp_path: Path) -> None:
    """Known zero pages are told of on the main channel; pages on the others must not overtake."""
    with pair(postcopy=postcopy, ram_bytes=4096 * MIB, fill_share=1 / 256, rate=5000) as (
        source,
        target,
    ):
        switch_on(source, target, channels=4)
        begin(source, target, tmp_path)
        if postcopy:
            source.service.start_postcopy()
        finish(source, target)
        assert source.figures["hole-pages"] > 900_000


@pytest.mark.parametrize(
    "capability", ["auto-converge", "release-ram", "pause-before-switchover", "postcopy-blocktime"]
)
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_beside_other_capabilities(capability: str, postcopy: bool, tmp_path: Path) -> None:
    with pair(postcopy=postcopy, ram_bytes=16 * MIB, rate=2000) as (source, target):
        switch_on(source, target)
        for each in (source, target):
            each.service.set_capabilities({capability: True})
        begin(source, target, tmp_path)
        if postcopy:
            source.service.start_postcopy()
        if capability == "pause-before-switchover":
            source.wait_status("pre-switchover")
            source.service.continue_("pre-switchover")
        finish(source, target)


@pytest.mark.parametrize("backing", [Backing.HUGETLB, Backing.MEMFD])
def test_other_memory(backing: Backing, tmp_path: Path) -> None:
    """Host pages of 2 MiB, of which each channel has a part; shared memory made huge afterwards."""
    with contextlib.ExitStack() as stack:
        if backing is Backing.HUGETLB:
            stack.enter_context(hugepages(2 * 16))
        source, target = stack.enter_context(pair(backing=backing, rate=10_000))
        switch_on(source, target, channels=3)
        target.service.set_parameters({"x-collapse": backing is Backing.MEMFD})
        source.service.set_parameters({"downtime-limit": 0})
        begin(source, target, tmp_path)
        source.wait_event("MIGRATION_PASS", **{"pass": 1})
        source.service.start_postcopy()
        finish(source, target)


def test_memory_that_changes_hands(tmp_path: Path) -> None:
    """Mode cpr-transfer: the channels stand there with nothing to carry."""
    with pair(postcopy=False, ram_bytes=16 * MIB, backing=Backing.MEMFD) as (source, target):
        switch_on(source, target)
        source.service.set_parameters({"mode": "cpr-transfer"})
        begin(source, target, tmp_path)
        finish(source, target)
        assert ram_of(source)["normal"] == 0


def test_max_bandwidth_holds(tmp_path: Path) -> None:
    """Over all channels together: no window of time carries more than a little above it."""
    limit = 8 * MIB
    with pair(postcopy=False, ram_bytes=32 * MIB, rate=500) as (source, target):
        switch_on(source, target, channels=4)
        source.service.set_parameters({"max-bandwidth": limit, "downtime-limit": 0})
        began_ns = time.monotonic_ns()
        begin(source, target, tmp_path)
        source.wait_event("MIGRATION_PASS", **{"pass": 1})
        sent, seconds = ram_of(source)["transferred"], (time.monotonic_ns() - began_ns) / 1e9
        assert sent > 30 * MIB
        # What four channels have in hand is on top of it.
        assert sent <= limit * seconds + 4 * MIB
        source.service.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})
        finish(source, target)


# -- ends that are none ---------------------------------------------------------------------------


def test_cancel_and_again(tmp_path: Path) -> None:
    """/migration/multifd/tcp/plain/cancel: nothing is left behind, the next one completes."""
    with pair(postcopy=False, ram_bytes=16 * MIB, rate=2000) as (source, first):
        switch_on(source, first, channels=3)
        source.service.set_parameters({"max-bandwidth": MIB, "downtime-limit": 0})
        begin(source, first, tmp_path)
        source.wait_status("active")
        source.service.cancel()
        assert source.service.wait(60) == "cancelled", source.service.query()
        assert first.service.wait(60) == "failed"
        assert source.machine.run_state == "running"
        source.service.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})
        with side(ram_bytes=16 * MIB, rate=2000, incoming=True) as second:
            switch_on(second, channels=3)
            source.service.migrate(second.service.migrate_incoming(f"unix:{tmp_path}/second"))
            finish(source, second)


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_yank_ends_every_wait(who: str, tmp_path: Path) -> None:
    """In the middle of a precopy: both ends fail soon, the guest goes on, nothing is left."""
    with nothing_left(), pair(postcopy=False, ram_bytes=16 * MIB, rate=2000) as (source, target):
        switch_on(source, target, channels=3)
        source.service.set_parameters({"max-bandwidth": MIB, "downtime-limit": 0})
        begin(source, target, tmp_path)
        source.wait_status("active")
        target.wait_status("active")
        (source if who == "source" else target).service.yank()
        for each in (source, target):
            assert each.service.wait(60) == "failed", each.service.query()
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


def test_a_destination_without_the_capability(tmp_path: Path) -> None:
    with nothing_left(), pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        switch_on(source, channels=2)
        begin(source, target, tmp_path)
        assert source.service.wait(60) == "failed"
        assert target.service.wait(60) == "failed"
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


def test_a_source_without_the_capability(tmp_path: Path) -> None:
    """The destination waits for channels that never come; whoever waits may be told to stop."""
    with nothing_left(), pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        switch_on(target, channels=2)
        begin(source, target, tmp_path)
        target.service.cancel()
        assert target.service.wait(60) == "cancelled"
        assert source.service.wait(60) == "failed"
        source.assert_sweep_clean()


def written(source: Side) -> int:
    return sum(block.populated().count() for block in source.machine.ram) << 12


def gather_late(listener: Listener, first: Channel, count: int, **options: Any) -> Any:
    """The main channel says what it is when all others are connected."""
    until(lambda: first.arrived(1), "the source connects them all")
    return gather(listener, first, count, **options)


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_more_channels_than_the_destination_has(
    late: bool, preempt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what went over the others nothing would ever come: it must never be taken for complete,
    and a source with more to send over them than a socket holds must not wait for ever.

    :param late: all have come before the first is looked at, so the first ones are enough."""
    if late:
        monkeypatch.setattr(incoming_side, "gather", gather_late)
    with (
        nothing_left(),
        pair(postcopy=preempt, ram_bytes=16 * MIB, rate=20_000) as (source, target),
    ):
        switch_on(source, channels=4)
        switch_on(target, channels=2)
        for each in (source, target):
            each.service.set_capabilities({"postcopy-preempt": preempt})
        source.machine.start()
        until(lambda: written(source) >= 2 * MIB, "the guest writes")
        begin(source, target, tmp_path)
        assert source.service.wait(60) == "failed", source.service.query()
        assert target.service.wait(60) == "failed", target.service.query()
        assert "multifd" in str(target.service.query()["error-desc"]) or not preempt
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


@pytest.mark.parametrize("uri", ["exec:cat", "fd:0", "file:/dev/null"])
def test_one_connection_is_not_enough(uri: str) -> None:
    """Refused by both ends before anything begins, in QEMU's words."""
    with side(ram_bytes=MIB) as source, side(ram_bytes=MIB, incoming=True) as target:
        switch_on(source, target)
        with pytest.raises(MigrationError, match="requires multi-channel URIs"):
            source.service.migrate(uri)
        with pytest.raises(MigrationError, match="requires multi-channel URIs"):
            target.service.migrate_incoming(uri)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("xbzrle", "Multifd is not compatible with xbzrle"),
        ("mapped-ram", "Mapped-ram migration is incompatible with multifd"),
    ],
)
def test_pairs_that_are_refused(other: str, words: str) -> None:
    with side(ram_bytes=MIB) as one:
        for first, second in ((other, "multifd"), ("multifd", other)):
            one.service.set_capabilities({first: True})
            with pytest.raises(MigrationError, match=words):
                one.service.set_capabilities({second: True})
            one.service.set_capabilities({first: False})


def test_compression_is_refused_by_name() -> None:
    with side(ram_bytes=MIB) as one, pytest.raises(MigrationError, match=r"'zstd' is not offered"):
        one.service.set_parameters({"multifd-compression": "zstd"})


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_channels_of_another_vm(same: bool, tmp_path: Path) -> None:
    """Channels name their VM, with or without validate-uuid, as a QEMU's do."""
    one, two = UUID(int=1), UUID(int=2)
    theirs = {"uuid": one if same else two}
    with (
        nothing_left(),
        pair(postcopy=False, ram_bytes=8 * MIB, uuid=one, destination=theirs) as (source, target),
    ):
        switch_on(source, target)
        begin(source, target, tmp_path)
        if same:
            finish(source, target)
            return
        assert source.service.wait(60) == "failed"
        assert target.service.wait(60) == "failed"
        assert f"UUID {one}, this machine's is {two}" in str(target.service.query()["error-desc"])
        source.assert_sweep_clean()


@pytest.mark.parametrize("at", [64, 70, 500, 5000, 300_000])
def test_a_bit_that_flips_on_a_channel(at: int, tmp_path: Path) -> None:
    """In a frame's head, a packet's head or a page: never taken for what was sent; the guest stays
    where it is."""
    with nothing_left(), pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        switch_on(source, target)
        listen(target, "unix", tmp_path)
        source.machine.start()
        with FlippingRelay(f"{tmp_path}/via", f"{tmp_path}/m", nth=2, at=at) as relay:
            source.service.migrate(relay.uri)
            for each in (source, target):
                assert each.service.wait(60) == "failed", each.service.query()
            assert relay.has_struck
        error = str(target.service.query()["error-desc"])
        assert "multifd channel 1" in error
        assert "frame" in error
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


def test_the_oracle_finds_what_plain_channels_let_through(tmp_path: Path) -> None:
    """The test above would see it: without checksums the same bit in a page arrives flipped."""
    with pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        switch_on(source, target)
        source.service.set_parameters({"x-checksum": False})
        listen(target, "unix", tmp_path)
        with FlippingRelay(f"{tmp_path}/via", f"{tmp_path}/m", nth=2, at=300_000) as relay:
            source.service.migrate(relay.uri)
            assert source.service.wait(60) == "completed", source.service.query()
            assert target.service.wait(60) == "completed", target.service.query()
            assert relay.has_struck
        assert target.machine.sweep().errors == 1


def test_switched_on_while_it_listens(tmp_path: Path) -> None:
    """One who only listens has not begun: what is switched on then holds."""
    with pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        uri = listen(target, "unix", tmp_path)
        switch_on(source, target, channels=3)
        source.machine.start()
        source.service.migrate(uri)
        finish(source, target)
        assert len(target.figures["multifd-channel-bytes"]) == 3
