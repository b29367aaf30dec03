"""The proxy itself, between two live QEMUs: each mishap really happens, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.proxy import Proxy
from tests.support.qemu import MIB, PAGE_BYTES, Qemu, pattern, require_qemu
from tests.support.stream_elements import Kind, Phase
from tests.support.tamper import (
    CutAt,
    DropPage,
    FlipByte,
    FlipPageByte,
    StallAt,
    SwapPages,
    Tamper,
    command,
    kind,
    message,
)

pytestmark = pytest.mark.interop

LOAD_AT = 0x40000
CONTENTS = pattern(96)
RAM = bytes(LOAD_AT) + CONTENTS + bytes(2 * MIB - LOAD_AT - len(CONTENTS))
# The first three pages with data: index 0 and every fourth are zero.
FIRST, SECOND = LOAD_AT + PAGE_BYTES, LOAD_AT + 2 * PAGE_BYTES


@contextmanager
def migration(
    *tampers: Tamper, postcopy: bool = False, slow: bool = False, listen: str = "unix"
) -> Iterator[tuple[Qemu, Qemu, Proxy]]:
    """A source and a destination with a proxy between them, migration started."""
    binary = require_qemu()
    with Qemu(binary, load={LOAD_AT: CONTENTS}) as source, Qemu(binary, incoming="defer") as dest:
        uri = f"unix:{dest.folder}/in"
        for side in (source, dest):
            side.set_capabilities("postcopy-ram" if postcopy else "return-path")
        dest.execute("migrate-incoming", uri=uri)
        with Proxy(uri, *tampers, listen=listen) as proxy:
            if postcopy:
                # Little before the switch; slow: the source still sends when something happens.
                source.set_parameters(
                    max_bandwidth=300_000, max_postcopy_bandwidth=60_000 if slow else 0
                )
            source.execute("migrate", uri=proxy.uri)
            if postcopy:
                source.execute("migrate-start-postcopy")
            yield source, dest, proxy


def differing_pages(ram: bytes) -> list[int]:
    """Offsets of the pages that are not what the source had."""
    return [
        at
        for at in range(0, len(RAM), PAGE_BYTES)
        if ram[at : at + PAGE_BYTES] != RAM[at : at + PAGE_BYTES]
    ]


@pytest.mark.parametrize("listen", ["unix", "tcp"])
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_without_tampers_it_is_a_wire(postcopy: bool, listen: str) -> None:
    """RAM arrives; the scanner saw every page once and the commands in their order."""
    with migration(postcopy=postcopy, listen=listen) as (source, dest, proxy):
        source.wait_status("completed")
        dest.wait_status("completed")
        assert dest.ram() == RAM
    pages = sum(proxy.seen[phase, Kind.PAGE] for phase in Phase)
    zeros = sum(proxy.seen[phase, Kind.ZERO] for phase in Phase)
    assert (pages, zeros) == (72, 440)
    assert proxy.names[-1] == "SHUT"
    if postcopy:
        commands = [
            n for n in proxy.names if n in ("ADVISE", "DISCARD", "PACKAGED", "LISTEN", "RUN")
        ]
        assert commands == ["ADVISE", "DISCARD", "PACKAGED", "LISTEN", "RUN"]
        assert proxy.seen[Phase.POSTCOPY, Kind.PAGE] > 0


def test_one_flipped_byte_damages_one_page() -> None:
    """QEMU's stream has no checksum: its destination takes the damage for data."""
    flip = FlipPageByte(0, phase=Phase.PRECOPY, at=5, mask=0x80)
    with migration(flip) as (source, dest, _):
        source.wait_status("completed")
        ram = dest.ram()
    assert flip.hits == 1
    assert differing_pages(ram) == [FIRST]
    assert ram[FIRST + 5] == RAM[FIRST + 5] ^ 0x80


def test_two_pages_swapped() -> None:
    """Both pages hold the other's contents, all else is right."""
    swap = SwapPages(phase=Phase.PRECOPY)
    with migration(swap) as (source, dest, _):
        source.wait_status("completed")
        ram = dest.ram()
    assert swap.hits == 1
    assert differing_pages(ram) == [FIRST, SECOND]
    assert ram[FIRST : FIRST + PAGE_BYTES] == RAM[SECOND : SECOND + PAGE_BYTES]


@pytest.mark.parametrize("nth", [0, 1, 71])
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_a_dropped_page_leaves_the_stream_whole(nth: int, postcopy: bool) -> None:
    """Exactly one page is missing and reads as zero; the record after it still finds its block."""
    drop = DropPage(nth, phase=None)
    with migration(drop, postcopy=postcopy) as (source, dest, _):
        source.wait_status("completed")
        dest.wait_status("completed")
        ram = dest.ram()
    assert drop.hits == 1
    assert drop.victim is not None
    assert differing_pages(ram) == [drop.victim.page_offset]
    assert not any(ram[drop.victim.page_offset :][:PAGE_BYTES])


def test_a_flipped_footer_ends_the_destination() -> None:
    """A framing byte is checked by QEMU; the source keeps its guest."""
    flip = FlipByte(kind(Kind.FOOTER), at=0)
    with migration(flip) as (source, dest, _):
        assert dest.wait_exit() != 0
        source.wait_status("failed", "completed")
    assert flip.hits == 1


def test_a_cut_inside_a_page_fails_both_sides() -> None:
    """The connection ends after 100 bytes of the tenth page."""
    cut = CutAt(kind(Kind.PAGE), nth=9, after=100)
    with migration(cut) as (source, dest, _):
        assert dest.wait_exit() != 0
        source.wait_status("failed")
        assert source.execute("query-status")["running"]
    assert cut.hits == 1


def test_a_cut_after_run_pauses_both_sides() -> None:
    """Past the package, a stock QEMU pauses the postcopy instead of failing it.

    A 7.2 source that has written all it had into the socket waits for SHUT for ever instead.
    """
    cut = CutAt(kind(Kind.PAGE, Phase.POSTCOPY), nth=2)
    with migration(cut, postcopy=True, slow=True) as (source, dest, proxy):
        source.wait_status("postcopy-paused")
        dest.wait_status("postcopy-paused")
        assert "RUN" in proxy.names


def test_a_stall_holds_until_told() -> None:
    """Nothing of PACKAGED but one byte gets through; afterwards all is well."""
    stall = StallAt(command("PACKAGED"), after=1)
    with migration(stall, postcopy=True) as (source, dest, proxy):
        assert stall.struck.wait(30)
        assert "LISTEN" not in proxy.names
        assert dest.query_migrate()["status"] == "active"
        stall.go_on()
        source.wait_status("completed")
        assert dest.ram() == RAM


def test_a_cut_before_shut_leaves_the_source_waiting_or_failed() -> None:
    """The return path is scanned too: SHUT never arrives."""
    cut = CutAt(message("SHUT"), after=0)
    with migration(cut) as (source, dest, proxy):
        dest.wait_status("completed")
        source.wait_status("failed", "completed")
        assert "SHUT" in proxy.names
    assert cut.hits == 1
