"""Whoever dies, breaks off or is cut off, wherever in the stream: the guest is in one place, whole.

Each case stalls the stream at one element, lets something happen, and then asks all that are left
who has the guest. Each element and each mishap in the usual run, every combination with
``POSTCOPY_INTEROP=full``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from migration.park.partial import PACKAGE, partials
from tests.interop.test_park_failures import (
    OPTIONS,
    assert_goes_on,
    bring_back,
    parking,
    source_vm,
)
from tests.support.guest_hops import (
    Verb,
    block_file,
    finish_sending,
    listen,
    manifest_of,
    park,
    same_memory,
    send,
    start_verb,
    unpark,
    way,
)
from tests.support.guest_matrix import wants_all
from tests.support.guest_vm import BLOCK, GuestVM
from tests.support.need import need
from tests.support.proxy import Proxy
from tests.support.qemu import QemuBinary, newer_qemu, require_qemu
from tests.support.qmp import QmpError
from tests.support.stream_elements import Element, Kind, Phase
from tests.support.tamper import StallAt, command, kind, message

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

SETTLED = ("failed", "cancelled", "completed", "postcopy-paused")


@dataclass(frozen=True)
class Place:
    """An element of the stream at which it stalls: the ``nth`` that ``where`` matches.

    :ivar is_last: a QEMU of 7.2 that is cut off there hangs for ever: the newer one is asked.
    """

    name: str
    where: Callable[[Element], bool]
    nth: int = 0
    after: int | None = None
    is_last: bool = False

    def stall(self) -> StallAt:
        return StallAt(self.where, nth=self.nth, after=self.after)


BEGIN = (
    Place("header", kind(Kind.HEADER)),
    Place("blocks", kind(Kind.RECORD, Phase.SETUP), after=20),
)
PRECOPY = (
    *BEGIN,
    Place("first-page", kind(Kind.PAGE, Phase.PRECOPY), after=100),
    Place("middle", kind(Kind.PAGE, Phase.PRECOPY), nth=300),
    Place("devices", kind(Kind.OPAQUE, Phase.PRECOPY), nth=5),
    Place("end", kind(Kind.END)),
    Place("answer", message("SHUT"), after=0),
)
POSTCOPY = (
    Place("discard", command("DISCARD")),
    Place("package", kind(Kind.OPAQUE, Phase.PACKAGE), nth=5),
    Place("run", command("RUN")),
    Place("late-page", kind(Kind.PAGE, Phase.POSTCOPY), nth=200),
    Place("late-end", kind(Kind.END, Phase.POSTCOPY), is_last=True),
    Place("late-answer", message("SHUT"), after=0, is_last=True),
)
# A QEMU before 10.2 gives its guest away with the first byte of the package, heard or not.
BEFORE_STATE = ("discard", "package")
BEFORE_SYNC = ("run",)  # all of it came; a park that is killed has it on disk or not yet
PLACES = (*PRECOPY, *POSTCOPY)
GIVING = (*BEGIN, *POSTCOPY)
MISHAPS = ("kill-qemu", "kill-us", "end-us", "cut")


def chosen(places: Sequence[Place], mishaps: Sequence[str]) -> list[tuple[Place, str]]:
    """All pairs, or so many that each of both is there."""
    if wants_all():
        return list(itertools.product(places, mishaps))
    return [(place, mishaps[index % len(mishaps)]) for index, place in enumerate(places)]


def names(value: object) -> str | None:
    return value.name if isinstance(value, Place) else None


def binary_for(place: Place, mishap: str) -> QemuBinary:
    """Each version at about half of the places."""
    installed = require_qemu()
    newer = newer_qemu()
    if place.is_last:
        need(newer, "no QEMU 10.0 unpacked here: `make qemu-10` does it where there is a mirror")
    is_odd = (PLACES.index(place) + (*MISHAPS, "cancel").index(mishap)) % 2
    return newer if newer and (place.is_last or is_odd) else installed


def strike(mishap: str, vm: GuestVM, verb: Verb, proxy: Proxy, stall: StallAt) -> None:
    """It happens while the stream stands still; then everything flows again."""
    match mishap:
        case "kill-qemu":
            vm.kill()
        case "kill-us":
            verb.kill()
            proxy.cut()
        case "end-us":
            verb.process.terminate()
        case "cut":
            proxy.cut()
        case "cancel":
            with contextlib.suppress(QmpError):  # newer ones refuse it once in postcopy
                vm.execute("migrate_cancel")
    stall.go_on()


def status_of(vm: GuestVM) -> str:
    return str(vm.query_migrate()["status"])


# -- a QEMU's guest on its way to us ----------------------------------------------


@pytest.mark.parametrize(("place", "mishap"), chosen(PLACES, [*MISHAPS, "cancel"]), ids=names)
def test_on_the_way_to_a_directory(tmp_path: Path, place: Place, mishap: str) -> None:
    """QEMU goes on with its guest and there is no directory; or it waits, and park --resume has the
    guest; or the directory has it. A directory of which that is not certain says so."""
    directory, stall, binary = tmp_path / "vm", place.stall(), binary_for(place, mishap)
    words = ("--give-up-after", "0.5")
    with source_vm(binary) as vm:
        with parking(directory, stall, words=words) as (verb, proxy):
            send(vm, proxy.uri, "postcopy" if place in POSTCOPY else "precopy")
            assert stall.struck.wait(60), proxy.names
            strike(mishap, vm, verb, proxy, stall)
            if mishap != "kill-qemu":
                vm.wait_status(*SETTLED)
            verb.wait()
            assert "Traceback" not in verb.said, verb.said
        if mishap == "kill-qemu":
            judge_without_source(directory)
        else:
            # The proxy had our answer, and lost it without a word: of that we cannot know.
            states = ["unconfirmed", *(["parked"] if "SHUT" in proxy.names else [])]
            before = (*BEFORE_STATE, *(BEFORE_SYNC if mishap == "kill-us" else ()))
            judge(vm, directory, binary, states, may_wait=place.name in before)


def judge_without_source(directory: Path) -> None:
    """Only we are left: the whole guest under its name, a part under another name, or nothing."""
    if directory.exists():
        assert manifest_of(directory)["state"] in ("parked", "unconfirmed")
        with Verb("parked", "--verify", str(directory)) as verb:
            verb.succeed()


def judge(
    vm: GuestVM, directory: Path, binary: QemuBinary, uncertain: list[str], *, may_wait: bool
) -> None:
    """By what QEMU believes.

    :param uncertain: states of a directory that QEMU does not believe in.
    :param may_wait: QEMU may wait with the whole guest, its device state lost on the way.
    """
    match status_of(vm):
        case "completed":
            assert manifest_of(directory)["state"] in ("parked", "unconfirmed")
            same_memory(vm, block_file(directory, BLOCK))
            bring_back(directory, binary, "--force")
        case "postcopy-paused":
            if directory.exists():  # it was not told any more
                assert manifest_of(directory)["state"] in uncertain
                bring_back(directory, binary, "--force")
                return
            if may_wait and not any((work / PACKAGE).exists() for work in partials(directory)):
                return
            resume(vm, directory)
            bring_back(directory, binary)
        case _:
            if directory.exists():
                assert manifest_of(directory)["state"] in uncertain
            assert_goes_on(vm)


def resume(vm: GuestVM, directory: Path) -> None:
    with way("unix", to_us=True) as way_:
        again, uri = start_verb("park", way_, "--resume", str(directory))
        with again:
            vm.execute("migrate", uri=uri, resume=True)
            again.succeed()
    finish_sending(vm)
    same_memory(vm, block_file(directory, BLOCK))


# -- and on its way back ------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parked") / "vm"
    with source_vm() as vm:
        park(vm, directory, "precopy", "unix")
    return directory


@pytest.fixture
def parked(template: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "vm"
    directory.mkdir()
    for file in template.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize(("place", "mishap"), chosen(GIVING, MISHAPS), ids=names)
def test_on_the_way_back(parked: Path, place: Place, mishap: str) -> None:
    """What the manifest says is true: ``parked`` only if no QEMU runs it, and it can be given then;
    ``giving`` is gone on with where QEMU waits, and with force where there is none any more."""
    stall, binary = place.stall(), binary_for(place, mishap)
    with GuestVM(binary, OPTIONS, incoming="defer") as vm:
        with way("unix", to_us=False) as way_:
            uri = listen(vm, way_)
            with Proxy(uri, stall) as proxy, Verb("unpark", str(parked), proxy.uri) as verb:
                assert stall.struck.wait(60), (proxy.names, verb.said)
                strike(mishap, vm, verb, proxy, stall)
                verb.wait()
                assert "Traceback" not in verb.said, verb.said
        waits = has_guest(vm)
        state = manifest_of(parked)["state"]
        if state == "parked":
            assert not waits
        elif waits:
            take_up_again(vm, parked, state)
            return
    words = [] if state == "parked" else ["--clone" if state == "given" else "--force"]
    if state == "given":
        words.append("--force")
    with GuestVM(binary, OPTIONS, incoming="defer") as other:
        unpark(parked, other, "unix", *words)
        other.execute("cont")
        other.assert_runs_clean()


def has_guest(vm: GuestVM) -> bool:
    """Whether this QEMU holds the guest, running or waiting for pages; else it has ended, or was
    killed."""
    try:
        has_it = vm.wait_status("postcopy-paused", "completed", "failed") != "failed"
        return has_it and vm.process.poll() is None
    except AssertionError:
        vm.wait_exit()
        return False


def take_up_again(vm: GuestVM, directory: Path, state: str) -> None:
    if status_of(vm) == "postcopy-paused":
        assert state == "giving"
        with way("unix", to_us=False) as way_:
            words = ["--resume", "--qmp", f"unix:{vm.monitor}"]
            with Verb("unpark", *words, str(directory), way_.listen) as verb:
                verb.succeed()
        vm.wait_status("completed")
        assert manifest_of(directory)["state"] == "given"
    vm.execute("cont")
    vm.assert_runs_clean()
