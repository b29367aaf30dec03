"""What goes wrong while a running guest passes through: it stays whole, on one side, and is had
again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.support.guest_hops import (
    Verb,
    finish_sending,
    listen,
    preempt_words,
    send,
    start_verb,
    way,
)
from tests.support.guest_image import layout_for
from tests.support.guest_vm import GuestOptions, GuestVM
from tests.support.proxy import Proxy
from tests.support.qemu import MIB, QemuBinary, newer_qemu, qemu_binary, require_qemu
from tests.support.roles import EXPECTED, RAM_BYTES, Role, ends_of
from tests.support.stream_elements import Kind, Phase
from tests.support.tamper import CutAt, FlipByte, StallAt, Tamper, kind, message

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

OPTIONS = GuestOptions(layout_for(32 * MIB))
SLOW = 4 << 20  # bytes per second of the postcopy phase, so that there is time to interrupt it


@dataclass
class Passage:
    """Source, relay and destination, a proxy on each leg."""

    source: GuestVM
    target: GuestVM
    relay: Verb
    upstream: Proxy
    downstream: Proxy

    def begin(self, mode: str) -> None:
        """Until the guest runs at the destination, most of its pages still at the source."""
        self.source.set_parameters(max_postcopy_bandwidth=SLOW)
        send(self.source, self.upstream.uri, mode)
        self.target.qmp.wait_event("RESUME")
        self.relay.wait_text("postcopy-active")

    def end(self) -> None:
        """The rest comes, fast."""
        self.source.set_parameters(max_postcopy_bandwidth=0)
        self.relay.succeed()
        finish_sending(self.source)
        self.target.wait_status("completed")
        self.target.assert_runs_clean()


@contextmanager
def passage(
    binary: QemuBinary | None = None,
    *upstream: Tamper,
    downstream: Sequence[Tamper] = (),
    preempt: bool = False,
    asks: bool = False,
) -> Iterator[Passage]:
    """:param asks: the relay knows B's monitor."""
    binary = binary or require_qemu()
    with (
        GuestVM(binary, OPTIONS) as source,
        GuestVM(binary, OPTIONS, incoming="defer") as target,
        way("unix", to_us=True) as in_,
        way("unix", to_us=False) as out,
    ):
        source.serial.wait_passes(2)
        if binary.version < (9, 0):
            source.execute("stop")
        with Proxy(listen(target, out, preempt=preempt), *downstream) as outgoing:
            words = preempt_words(target) if preempt else []
            words += ["--qmp", f"unix:{target.monitor}"] if asks else []
            relay, here = start_verb("relay", in_, outgoing.uri, *words)
            with relay, Proxy(here, *upstream) as incoming:
                yield Passage(source, target, relay, incoming, outgoing)


@pytest.mark.parametrize("mode", ["postcopy", "preempt"])
def test_a_cut_upstream_is_mended(qemu_binary: QemuBinary, mode: str) -> None:
    """The guest at B goes on with what is there; what it asks for waits for A."""
    with passage(qemu_binary, preempt=mode == "preempt") as on_way:
        on_way.begin(mode)
        on_way.upstream.cut()
        on_way.source.wait_status("postcopy-paused")
        on_way.relay.wait_text("migrate -r")
        on_way.source.execute("migrate", uri=on_way.upstream.uri, resume=True)
        on_way.end()


def test_the_last_word_of_the_destination_is_lost() -> None:
    """It says so to nobody but its monitor, where the relay asks."""
    cut = CutAt(message("SHUT"), after=0)
    with passage(downstream=[cut], asks=True) as on_way:
        on_way.begin("postcopy")
        on_way.end()
        assert cut.hits == 1
        assert "only its last word is missing" in on_way.relay.said


@pytest.mark.parametrize("mode", ["postcopy", "preempt"])
def test_a_cut_downstream_is_mended(qemu_binary: QemuBinary, mode: str) -> None:
    """A goes on sending meanwhile; B gets the rest, and what was under way, once it listens."""
    with passage(qemu_binary, preempt=mode == "preempt") as on_way:
        on_way.begin(mode)
        on_way.downstream.cut()
        on_way.target.wait_status("postcopy-paused")
        on_way.relay.wait_text("migrate_recover")
        listens_at = on_way.downstream._connect_to  # where the relay connects, behind the proxy
        on_way.target.execute("migrate-recover", uri=listens_at)
        on_way.end()


def test_what_takes_no_guest_is_told_of_seldom(qemu_binary: QemuBinary) -> None:
    """Something listens for B and ends each connection at once (here the proxy, with nobody behind
    it): a line for the first, then ever fewer, however long it lasts. B is had again all the same.
    """
    with passage(qemu_binary) as on_way:
        on_way.begin("postcopy")
        listens_at, on_way.downstream._connect_to = on_way.downstream._connect_to, "unix:/nowhere"
        on_way.downstream.cut()
        on_way.target.wait_status("postcopy-paused")
        on_way.relay.wait_text("broke again, 8 times by now")
        said = on_way.relay.text
        warnings = [line for line in said if line.startswith("warning: the connection to the")]
        assert len(warnings) < 8, warnings
        assert sum("postcopy-recover-setup" in line for line in said) == 1
        on_way.downstream._connect_to = listens_at
        on_way.end()


def test_a_paused_guest_is_said_to_be_one(qemu_binary: QemuBinary) -> None:
    """Its source moved it by precopy, and would have it paused at the end; a relay cannot."""
    with passage(qemu_binary) as on_way:
        if on_way.source.run_state() == "running":
            on_way.source.execute("stop")
        send(on_way.source, on_way.upstream.uri, "precopy")
        on_way.relay.succeed()
        assert "note: this guest is paused" in on_way.relay.said
        finish_sending(on_way.source)
        on_way.target.wait_status("completed")
        on_way.target.assert_runs_clean()


def test_both_legs_cut_at_once(qemu_binary: QemuBinary) -> None:
    with passage(qemu_binary) as on_way:
        on_way.begin("postcopy")
        on_way.upstream.cut()
        on_way.downstream.cut()
        on_way.source.wait_status("postcopy-paused")
        on_way.target.wait_status("postcopy-paused")
        on_way.target.execute("migrate-recover", uri=on_way.downstream._connect_to)
        on_way.relay.wait_text("postcopy-recover")
        on_way.source.execute("migrate", uri=on_way.upstream.uri, resume=True)
        on_way.end()


@pytest.mark.parametrize("mode", ["postcopy", "preempt"])
def test_the_relay_dies_and_both_ends_go_on_without_it(qemu_binary: QemuBinary, mode: str) -> None:
    """A has all of RAM still, B says what it has: they recover with each other."""
    with passage(qemu_binary, preempt=mode == "preempt") as on_way, way("unix", to_us=False) as new:
        on_way.begin(mode)
        on_way.relay.kill()
        on_way.source.wait_status("postcopy-paused")
        on_way.target.wait_status("postcopy-paused")
        on_way.target.execute("migrate-recover", uri=new.listen)
        on_way.source.set_parameters(max_postcopy_bandwidth=0)
        on_way.source.execute("migrate", uri=new.connect, resume=True)
        finish_sending(on_way.source)
        on_way.target.wait_status("completed")
        on_way.target.assert_runs_clean()


def test_cancelled_at_the_source(qemu_binary: QemuBinary) -> None:
    """Before the guest moved it stays at A, and B is left without one."""
    stall = StallAt(kind(Kind.PAGE, Phase.PRECOPY), nth=100)
    with passage(qemu_binary, stall) as on_way:
        on_way.source.set_capabilities("postcopy-ram")
        on_way.source.execute("migrate", uri=on_way.upstream.uri)
        assert stall.struck.wait(30)
        on_way.source.execute("migrate_cancel")
        stall.go_on()
        on_way.source.wait_status("cancelled", "failed")
        on_way.relay.fail("still the source's")
        if on_way.source.run_state() != "running":
            on_way.source.execute("cont")
        on_way.source.assert_runs_clean()


def test_no_destination(qemu_binary: QemuBinary) -> None:
    """Nobody listens where the guest should go: A is told before it stops its guest."""
    with GuestVM(qemu_binary, OPTIONS) as source, way("unix", to_us=True) as in_:
        source.serial.wait_passes(2)
        relay, here = start_verb("relay", in_, "unix:/nowhere")
        with relay:
            source.set_capabilities("postcopy-ram")
            source.execute("migrate", uri=here)
            relay.fail("Failed to connect", "still the source's")
            source.wait_status("failed")
            source.assert_runs_clean()


def test_the_destination_refuses(qemu_binary: QemuBinary) -> None:
    """Another machine there: A keeps its guest."""
    other = GuestOptions(layout_for(32 * MIB), machine="pc-i440fx-6.2")
    with (
        GuestVM(qemu_binary, OPTIONS) as source,
        GuestVM(qemu_binary, other, incoming="defer") as target,
        way("unix", to_us=True) as in_,
        way("unix", to_us=False) as out,
    ):
        source.serial.wait_passes(2)
        relay, here = start_verb("relay", in_, listen(target, out))
        with relay:
            send(source, here, "precopy")
            relay.fail("still the source's")
            source.wait_status("failed")
            if source.run_state() != "running":
                source.execute("cont")
            source.serial.wait_passes(2)


def test_the_destination_refuses_the_package() -> None:
    """A source that asks before it gives its guest away hears nothing before B has loaded it, and
    has its guest still."""
    flip = FlipByte(lambda e: e.kind is Kind.SECTION and e.phase is Phase.PACKAGE, at=6)
    # Nothing more is written to B, which ends: so its answer is read, and no broken pipe instead.
    rest = StallAt(lambda e: e.phase is Phase.POSTCOPY, after=0)
    with (
        ends_of(Role(None, "newer")) as ends,
        way("unix", to_us=True) as in_,
        way("unix", to_us=False) as out,
    ):
        ends.target.switch_on("return-path", "postcopy-ram")
        with Proxy(ends.listen(out.listen), flip, rest) as downstream:
            relay, here = start_verb("relay", in_, downstream.uri)
            with relay:
                ends.source.switch_on("return-path", "postcopy-ram")
                ends.source.set(max_bandwidth=1 << 20)
                ends.source.execute("migrate", uri=here)
                ends.source.execute("migrate-start-postcopy")
                ends.source.wait("failed")
                relay.fail("refused", "still the source's")
        assert flip.hits == 1
        assert ends.source.run_state == "running"
        assert ends.source.read(0, RAM_BYTES) == EXPECTED


@pytest.mark.parametrize("insist", [False, True], ids=["once", "twice"])
def test_told_to_stop_when_the_guest_has_moved(insist: bool) -> None:
    """A has sent everything, B lacks most of it. Cut off, A would start its guest beside B's: so it
    goes on. Who insists loses pages, and A is told that its guest is gone."""
    stall = StallAt(kind(Kind.PAGE, Phase.POSTCOPY), nth=200)
    with passage(newer_qemu(), downstream=[stall]) as on_way:
        send(on_way.source, on_way.upstream.uri, "postcopy")
        assert stall.struck.wait(60), (on_way.upstream.names, on_way.downstream.names)
        on_way.relay.process.terminate()
        on_way.relay.wait_text("going on until it has them")
        if not insist:
            stall.go_on()
            on_way.end()
            return
        on_way.relay.wait_text("all of the guest is here")
        on_way.relay.process.terminate()
        assert on_way.relay.wait() == 130
        finish_sending(on_way.source)
