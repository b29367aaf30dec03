"""A destination given multifd channels: those of recorded QEMUs, and hostile ones, whose every end
is a typed error that names channel and packet."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestmem import TARGET_PAGE_BYTES
from migration.wire import headers
from migration.wire.constants import MULTIFD_PACKET_BYTES, RamFlag, SectionType
from migration.wire.headers import Configuration, SectionHeader
from migration.wire.io import BytesWriter
from migration.wire.ram_setup import RamSetup, RamSetupBlock, write_ram_setup
from tests.support.analyze_vectors import content, expected_ram, recording
from tests.support.multifd_replay import Outcome, greeting, packet, page_of, play, sync
from tests.support.pair import Side

pytestmark = pytest.mark.kernel

PAGE = TARGET_PAGE_BYTES
PAGES = 16
RAM = PAGES * PAGE
RECORDED = [
    ("7.2", "none-multifd-none-2m"),
    ("10.0", "none-multifd-2m"),
    ("11.1", "none-multifd-postcopy-4m"),
]


@cache
def recorded(version: str, name: str) -> tuple[bytes, ...]:
    return tuple(content(path) for path in recording(version, name).to_destination)


@cache
def bystander() -> Side:
    """Another machine's RAM in this process: nobody may write there."""
    one = Side(machine_type="none", smp=0, fill_share=0.0, ram_bytes=RAM)
    for block in one.machine.ram:
        block.fill(0, block.used_length, 0xA5)
    return one


def check(outcome: Outcome) -> None:
    """What holds for every end."""
    assert outcome.status in ("completed", "failed", "postcopy-paused"), outcome
    assert bool(outcome.error) is (outcome.status != "completed"), outcome
    for block in bystander().machine.ram:
        assert block.read(0, block.used_length) == b"\xa5" * block.used_length


def main_channel(rounds: int = 1, *, flush: bool = True) -> bytes:
    """A precopy of bare RAM whose pages all come over channels, which meet at the START section and
    then ``rounds`` times more."""
    out = BytesWriter()
    headers.write_file_header(out)
    headers.write_configuration(out, Configuration("none"))
    header = SectionHeader(SectionType.START, 1, "ram", 0, 4)
    headers.write_section_header(out, header)
    write_ram_setup(out, RamSetup((RamSetupBlock("ram", RAM),), multifd_flush=flush))
    headers.write_footer(out, 1)
    for number in range(rounds):
        kind = SectionType.END if number == rounds - 1 else SectionType.PART
        headers.write_section_header(out, SectionHeader(kind, 1, "ram", 0, 4))
        if flush:
            out.write(int(RamFlag.MULTIFD_FLUSH).to_bytes(8, "big"))
        out.write(int(RamFlag.EOS).to_bytes(8, "big"))
        headers.write_footer(out, 1)
    headers.write_end_of_stream(out)
    headers.write_vmdescription(out, b"{}")
    return out.getvalue()


@pytest.mark.parametrize(("version", "name"), RECORDED)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_recorded(version: str, name: str, order: tuple[int, ...]) -> None:
    """Whoever connects first, all of RAM is there; of 11.1 with a postcopy after it."""
    connections = recorded(version, name)
    ram = expected_ram(name)
    assert ram is not None
    outcome = play(
        [connections[index] for index in order], ram_bytes=len(ram), postcopy="postcopy" in name
    )
    assert (outcome.status, outcome.error) == ("completed", "")
    assert outcome.ram == ram


@pytest.mark.parametrize("flush", [True, False], ids=["9.0", "7.2"])
def test_by_hand(flush: bool) -> None:
    """As a measure for the rest. A page goes over one channel and, after a SYNC, over the other;
    the later one stays, and zero clears what was there."""
    slots = 0 if flush else 128
    meet = sync(slots=slots)
    first = greeting(0) + meet + packet([0, PAGE, 5 * PAGE]) + meet + packet([], [PAGE]) + meet
    stale = packet(size=77, idstr=b"stale")  # as 7.2 leaves it: no data follow
    newer = packet([0], data=b"\x99" * PAGE)
    second = greeting(1) + meet + packet([], [7 * PAGE]) + stale + meet + newer + meet
    outcome = play([main_channel(2, flush=flush), first, second], ram_bytes=RAM)
    assert (outcome.status, outcome.error) == ("completed", "")
    wanted = bytearray(RAM)
    wanted[:PAGE] = b"\x99" * PAGE
    wanted[5 * PAGE : 6 * PAGE] = page_of(5 * PAGE)
    assert outcome.ram == wanted


BAD = {
    "magic": (b"\x11\x22\x33\x45" + bytes(MULTIFD_PACKET_BYTES), "no multifd packet starts here"),
    "version": (packet([0], version=2), "no multifd packet starts here"),
    "slots": (packet([0], slots=129), "room for more pages than a packet has"),
    "slots-huge": (packet([0], slots=1 << 31), "room for more pages than a packet has"),
    "normal": (packet([0], counts=(129, 0)), "more pages than the packet has room for"),
    "normal-huge": (packet([0], counts=(0xFFFFFFFF, 0)), "more pages than the packet has room"),
    "zero": (packet([0], counts=(0, 129)), "more pages than the packet has room for"),
    "both": (packet([0], counts=(100, 29)), "more pages than the packet has room for"),
    "overflow": (packet([0], counts=(1, 0xFFFFFFFF)), "more pages than the packet has room for"),
    "no-room": (packet([0], slots=0), "more pages than the packet has room for"),
    "size": (packet([0], size=PAGE - 1), "another number of bytes than its pages have"),
    "size-huge": (packet([0], size=0xFFFFFFFF), "another number of bytes than its pages have"),
    "beyond": (packet([RAM]), "a page beyond the end of its block (block ram, 0x10000)"),
    "beyond-zero": (packet([], [RAM]), "a page beyond the end of its block"),
    "beyond-last": (packet([0, PAGE, 1 << 63]), "a page beyond the end of its block"),
    "unaligned": (packet([1]), "a page that is not aligned (block ram, 0x1)"),
    "unaligned-zero": (packet([], [PAGE - 8]), "a page that is not aligned"),
    "block": (packet([0], idstr=b"rom"), "pages of unknown RAM block 'rom'"),
    "no-block": (packet([0], idstr=b""), "pages of unknown RAM block ''"),
    "endless-name": (packet([0], idstr=b"r" * 256), "a block name without an end"),
    "compressed": (packet([0], flags=2), "compressed pages (multifd-compression) are not offered"),
    "device": (packet([0], flags=0x40), "device state over multifd is not offered"),
    "flags": (packet([0], flags=0x80), "unknown packet flags"),
    "cut-head": (packet([0])[:1000], "the connection closed inside it"),
    "cut-page": (packet([0])[:-1], "the connection closed inside it"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_packet(kind: str) -> None:
    """Its channel and its number are named, and what is wrong with it."""
    bad, words = BAD[kind]
    good = greeting(0) + sync() + packet([0]) + sync()
    channel = greeting(1) + sync() + packet([PAGE]) + bad
    outcome = play([main_channel(), good, channel], ram_bytes=RAM)
    check(outcome)
    assert outcome.status == "failed"
    assert words in outcome.error
    assert "multifd channel 1" in outcome.error
    assert "packet 2: " in outcome.error


def test_a_channel_that_ends_before_its_sync() -> None:
    good = greeting(0) + sync() + sync()
    outcome = play([main_channel(), good, greeting(1) + sync() + packet([0])], ram_bytes=RAM)
    check(outcome)
    assert "multifd channel 1 ended after 2 packets, before the SYNC" in outcome.error


def test_a_page_after_the_last_sync_is_not_waited_for() -> None:
    """Whether it is stored nobody can know: it must do no harm, and must not keep the guest."""
    late = greeting(0) + sync() + sync() + packet([3 * PAGE])
    outcome = play([main_channel(), late, greeting(1) + sync() + sync()], ram_bytes=RAM)
    assert outcome.status == "completed"


@settings(max_examples=max(20, settings().max_examples // 4))
@given(data=st.data())
def test_damaged(data: st.DataObject) -> None:
    """Recorded channels with bytes changed or the end cut off."""
    version, name = data.draw(st.sampled_from(RECORDED))
    connections = [bytearray(each) for each in recorded(version, name)]
    victim = connections[data.draw(st.integers(0, len(connections) - 1))]
    last = len(victim) - 1
    head = st.integers(0, min(last, 64 + 2 * MULTIFD_PACKET_BYTES))
    for at in data.draw(st.lists(head | st.integers(0, last), max_size=3)):
        victim[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del victim[data.draw(st.integers(4, last)) :]
    ram = expected_ram(name)
    assert ram is not None
    check(
        play([bytes(each) for each in connections], ram_bytes=len(ram), postcopy="postcopy" in name)
    )
