"""Whoever dies, breaks off or is cut off while a guest passes through, wherever in either stream:
it is in one place, whole.

Like :mod:`tests.interop.test_park_phases`, for both legs of a relay: the stream stalls at one
element of one leg, something happens, and then all that are left are asked who has the guest. Each
element and each mishap in the usual run, every combination with ``POSTCOPY_INTEROP=full``.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.interop.test_park_failures import assert_goes_on
from tests.interop.test_park_phases import BEGIN, SETTLED, Place, chosen, has_guest, names
from tests.interop.test_relay_failures import SLOW, Passage, passage
from tests.support.guest_hops import Verb, finish_sending, send, way
from tests.support.guest_vm import GuestVM
from tests.support.need import need
from tests.support.qemu import QemuBinary, newer_qemu
from tests.support.stream_elements import Kind, Phase
from tests.support.tamper import command, kind, message

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

# From A to us: a guest that is not ours yet, then one that is on its way.
UPSTREAM = (
    *BEGIN,
    Place("first-page", kind(Kind.PAGE, Phase.PRECOPY), after=100),
    Place("discard", command("DISCARD")),
    Place("package", kind(Kind.OPAQUE, Phase.PACKAGE), nth=5),
    Place("late-page", kind(Kind.PAGE, Phase.POSTCOPY), nth=200),
    Place("late-end", kind(Kind.END, Phase.POSTCOPY)),
    Place("late-answer", message("SHUT"), after=0),
)
# From us to B.
DOWNSTREAM = (
    *BEGIN,
    Place("discard", command("DISCARD")),
    Place("package", kind(Kind.OPAQUE, Phase.PACKAGE), nth=5),
    Place("run", command("RUN")),
    Place("late-page", kind(Kind.PAGE, Phase.POSTCOPY), nth=200),
    Place("late-end", kind(Kind.END, Phase.POSTCOPY)),
    Place("late-answer", message("SHUT"), after=0),
)
MISHAPS = ("kill-source", "kill-target", "kill-us", "end-us", "cut-upstream", "cut-downstream")
LEGS = {"upstream": UPSTREAM, "downstream": DOWNSTREAM}
# A stock source of 9.x and later whose connection ends between its last byte and our answer starts
# its guest again, whatever became of it (docs/limits.md): nothing of ours could be at fault.
UNANSWERED = ("late-end", "late-answer")


def cases() -> list[tuple[str, Place, str]]:
    return [
        (leg, place, mishap)
        for leg, places in LEGS.items()
        for place, mishap in chosen(places, MISHAPS)
        if not is_the_sources_own(place, mishap)
    ]


def is_the_sources_own(place: Place, mishap: str) -> bool:
    return place.name in UNANSWERED and mishap in ("kill-us", "cut-upstream")


def newest() -> QemuBinary:
    """One that says how a migration ended wherever it is cut off."""
    binary = newer_qemu()
    need(binary, "no QEMU 10.0 unpacked here: `make qemu-10` does it where there is a mirror")
    assert binary is not None
    return binary


@pytest.mark.parametrize(("leg", "place", "mishap"), cases(), ids=names)
def test_on_either_leg(leg: str, place: Place, mishap: str) -> None:
    """A's guest goes on there, or B has it, now or once both can reach each other again; never
    both, and never a page that nobody sent."""
    stall = place.stall()
    upstream, downstream = ([stall], []) if leg == "upstream" else ([], [stall])
    is_precopy = leg == "upstream" and place in (*BEGIN, UPSTREAM[len(BEGIN)])
    with passage(newest(), *upstream, downstream=downstream) as on_way:
        on_way.source.set_parameters(max_postcopy_bandwidth=SLOW)  # it is not done beforehand
        send(on_way.source, on_way.upstream.uri, "precopy" if is_precopy else "postcopy")
        assert stall.struck.wait(60), (on_way.upstream.names, on_way.downstream.names)
        strike(mishap, on_way)
        stall.go_on()
        if mishap == "kill-source":
            judge_without_source(on_way)
        elif mishap == "kill-target":
            judge_without_target(on_way)
        elif mishap.startswith("cut") and waits(on_way.relay):
            mend(on_way, mishap)
        else:
            judge_without_relay(on_way, is_precopy=is_precopy)


def strike(mishap: str, on_way: Passage) -> None:
    match mishap:
        case "kill-source":
            on_way.source.kill()
        case "kill-target":
            on_way.target.kill()
        case "kill-us":
            on_way.relay.kill()
            on_way.upstream.cut()
            on_way.downstream.cut()
        case "end-us":  # which goes on when the guest has moved already
            on_way.relay.process.terminate()
        case "cut-upstream":
            on_way.upstream.cut()
        case "cut-downstream":
            on_way.downstream.cut()


def waits(relay: Verb) -> bool:
    """Whether it wants an end to come back; else it has ended."""
    try:
        relay.wait_text("warning: ")
    except AssertionError:
        relay.wait()
        return False
    return True


def has_it(on_way: Passage) -> bool:
    """Whether B has the guest, running or waiting for pages; it may not have heard of it yet."""
    return "PACKAGED" in on_way.downstream.names and has_guest(on_way.target)


def is_complete(vm: GuestVM) -> bool:
    return str(vm.query_migrate()["status"]) == "completed"


def end(relay: Verb) -> None:
    """Told twice where the guest has moved: it goes on else."""
    relay.process.terminate()
    with contextlib.suppress(AssertionError):
        relay.wait_text("to stop again")
        relay.process.terminate()
    relay.wait()
    assert "Traceback" not in relay.said, relay.said


def judge_without_source(on_way: Passage) -> None:
    """What had not come is lost; what runs at B waits for it, and sees no zeros instead."""
    if waits(on_way.relay):
        end(on_way.relay)
        if has_it(on_way):
            assert on_way.target.run_state() == "running"
        else:
            on_way.target.wait_exit()
            return
    elif on_way.relay.process.returncode == 0:
        on_way.target.wait_status("completed")
        on_way.target.assert_runs_clean()
    else:
        assert "still the source's" in on_way.relay.said, on_way.relay.said
        assert not has_it(on_way)
    assert on_way.target.serial.complaints == []


def judge_without_target(on_way: Passage) -> None:
    """Before B may have run A goes on, where a QEMU can; afterwards it must not."""
    if waits(on_way.relay):
        end(on_way.relay)
        assert on_way.source.wait_status(*SETTLED) in ("completed", "postcopy-paused")
        assert on_way.source.run_state() != "running"
        return
    assert "Traceback" not in on_way.relay.said, on_way.relay.said
    if on_way.source.wait_status(*SETTLED) in ("failed", "cancelled"):
        assert_goes_on(on_way.source)
    else:
        assert on_way.source.run_state() != "running"


def mend(on_way: Passage, mishap: str) -> None:
    """The relay has both halves together, and goes on with whoever comes back."""
    if mishap == "cut-upstream":
        on_way.source.wait_status("postcopy-paused")
        on_way.source.execute("migrate", uri=on_way.upstream.uri, resume=True)
    elif has_it(on_way):
        if is_complete(on_way.target):  # its last word was lost, and nobody asked its monitor
            on_way.relay.wait_text("only its last word is missing")
            end(on_way.relay)
            finish_sending(on_way.source)
            on_way.target.assert_runs_clean()
            return
        on_way.target.execute("migrate-recover", uri=on_way.downstream._connect_to)
    else:  # cut off in the package: it ended, and may have had all of it, for all we know
        end(on_way.relay)
        on_way.source.wait_status(*SETTLED)
        assert on_way.source.run_state() != "running"
        return
    on_way.end()


def judge_without_relay(on_way: Passage, *, is_precopy: bool) -> None:
    """A and B are left. Between them they have all of the guest, if B got its devices."""
    on_way.source.set_parameters(max_postcopy_bandwidth=0)
    on_way.relay.wait()
    assert "Traceback" not in on_way.relay.said, on_way.relay.said
    source, target = on_way.source, on_way.target
    settled, is_there = source.wait_status(*SETTLED), has_it(on_way)
    if settled in ("failed", "cancelled"):
        assert not is_there
        assert_goes_on(source)
        return
    assert source.run_state() != "running"
    if not is_there:
        # Its package went astray, which a QEMU before 10.2 never gets over.
        assert settled == "postcopy-paused"
        assert not is_precopy
        return
    if str(target.query_migrate()["status"]) == "postcopy-paused":
        recover_directly(source, target)
    target.assert_runs_clean()


def recover_directly(source: GuestVM, target: GuestVM) -> None:
    source.set_parameters(max_postcopy_bandwidth=0)
    with way("unix", to_us=False) as new:
        target.execute("migrate-recover", uri=new.listen)
        source.execute("migrate", uri=new.connect, resume=True)
        finish_sending(source)
        target.wait_status("completed")
