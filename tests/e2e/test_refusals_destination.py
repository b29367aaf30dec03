"""A destination that cannot take the guest says so early; the guest runs on and goes elsewhere.

Early means: before the guest is stopped. Each refusal names its cause at the destination and says
at the source where to look; then the very same guest is migrated to a destination that can.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from migration.runtime.affinity import Placement
from migration.toyvm.options import VCpuKind
from tests.support.e2e_child import Child, child
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import more_hugepages
from tests.support.pair import MIB, Side, pair, side
from tests.support.toyvm_kvm import need_kvm

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

RAM_BYTES = 8 * MIB
HUGE = {"backing": "hugetlb"}
KVM = {"vcpu": "kvm"}
SAID_NO = r"the destination refused the migration \(SHUT 1\)"
HUNG_UP = r"the destination closed the return path; if the destination refused .* its own error"


@dataclass(frozen=True)
class Case:
    """One destination that must refuse.

    :ivar there, here: options in which destination and source differ from the plain machine.
    :ivar says: what the destination's error must hold. :ivar hears: what the source's must.
    :ivar calls: what is done to the destination's process before the source comes.
    """

    says: str
    hears: str = SAID_NO
    there: dict[str, Any] = field(default_factory=dict)
    here: dict[str, Any] = field(default_factory=dict)
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


CASES = {
    "smaller pages here": Case(
        r"the source has 4 KiB pages, this host 4 KiB and 2048 KiB|"
        r"the source has 4 KiB pages, this host 2048 KiB pages",
        there=HUGE,
    ),
    "larger pages here": Case(r"the source has 2048 KiB pages, this host 4 KiB pages", here=HUGE),
    "a block too few": Case(
        r"unknown RAM block 'toy.more': not on this machine",
        here={"extra_blocks": (("toy.more", MIB),)},
    ),
    "a block too many": Case(
        r"RAM block 'toy.more' is here but not at the source",
        there={"extra_blocks": (("toy.more", MIB),)},
    ),
    "a longer block": Case(
        r"size mismatch: toy.ram: 0x800000 at the source, 0x900000 here",
        there={"ram_bytes": 9 * MIB},
    ),
    "another machine type": Case(
        r"machine type received is 'toy-1.1' and local is 'toy-1.0'",
        hears=HUNG_UP,
        there={"machine_type": "toy-1.0"},
    ),
    "postcopy is off": Case(
        r"the source wants postcopy, and capability postcopy-ram is off here",
        there={"postcopy": False},
    ),
    "no permission for a machine whose accesses the kernel makes": Case(
        r"/dev/userfaultfd does not let this user in.*unprivileged_userfaultfd=0",
        there={"needs_kernel": True},
        calls=(("become_nobody", {}),),
    ),
    "no permission for KVM": Case(
        r"/dev/userfaultfd does not let this user in.*unprivileged_userfaultfd=0",
        here=KVM,
        there=KVM,
        calls=(("become_nobody", {}),),
    ),
    "userfaultfd taken away by the container": Case(
        r"userfaultfd\(2\)",
        calls=(("become_nobody", {}), ("deny_userfaultfd", {})),
    ),
    "no file descriptor left": Case(
        r"[Tt]oo many open files",
        calls=(("run_out_of_descriptors", {"on": "active"}),),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    """Each case, with the huge pages it takes."""
    case = CASES[request.param]
    with ExitStack() as stack:
        if case.here is KVM:
            need_kvm()
        if HUGE in (case.there, case.here):
            stack.enter_context(more_hugepages(2 * RAM_BYTES >> 21, tmp_path / "journal"))
        yield case


@contextmanager
def running_source(**options: Any) -> Iterator[Side]:
    """A guest at work, with postcopy asked for."""
    if "backing" in options:
        options["backing"] = Backing(options["backing"])
    if "vcpu" in options:
        options["vcpu"] = VCpuKind(options["vcpu"])
    with nothing_left(), side(ram_bytes=RAM_BYTES, smp=2, rate=20_000, **options) as source:
        source.service.set_capabilities({"postcopy-ram": True})
        source.machine.start()
        yield source


def operations(source: Side) -> int:
    done = source.machine.statistics()["ops"]
    assert isinstance(done, int)
    return done


def assert_runs_on(source: Side) -> None:
    """The guest was never stopped, and does things."""
    assert source.machine.run_state == "running"
    assert ("STOP", {}) not in source.events
    before, deadline = operations(source), time.monotonic() + 30
    while operations(source) <= before:  # nothing tells of a touch but the counter
        assert time.monotonic() < deadline, "the guest stands still"
        time.sleep(0.001)


def migrate_elsewhere(source: Side, options: dict[str, Any], uri: str) -> None:
    """The same guest to a destination of its own kind: completed, and the oracle clean there."""
    with child("elsewhere", incoming=True, ram_bytes=RAM_BYTES, smp=2, **options) as destination:
        destination.call("service", "migrate_incoming", uri)
        migrate_by_postcopy(source.service, uri)
        assert source.service.wait(30) == "completed", source.service.query()
        assert destination.call("service", "wait", 30) == "completed"
        report = destination.call("sweep")
        assert report["errors"] == 0, report


def refuse(source: Side, destination: Child, case: Case, uri: str) -> None:
    """Migrate there and be refused, on both sides, in words."""
    migrate_by_postcopy(source.service, uri)
    assert source.service.wait(30) == "failed"
    assert destination.call("service", "wait", 30) == "failed"
    theirs = destination.call("service", "query")["error-desc"]
    ours = source.service.query()["error-desc"]
    print(f"destination: {theirs}\nsource: {ours}")
    assert destination.call("run_state") == "inmigrate"
    _assert_matches(case.says, theirs)
    _assert_matches(case.hears, str(ours))


def _assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text, re.DOTALL), text


def test_refused_and_migrated_elsewhere(case: Case, tmp_path: Path) -> None:
    """The whole story, for each cause."""
    uri = f"unix:{tmp_path}/refusing"
    there = {"ram_bytes": RAM_BYTES, "smp": 2, **case.there}
    with running_source(**case.here) as source:
        with child("destination", incoming=True, **there) as destination:
            destination.call("service", "migrate_incoming", uri)
            for name, arguments in case.calls:
                destination.call(name, **arguments)
            refuse(source, destination, case, uri)
        assert_runs_on(source)
        migrate_elsewhere(source, case.here, f"unix:{tmp_path}/elsewhere")


def test_a_hook_that_raises_ends_it(tmp_path: Path) -> None:
    """Whatever it raises, before there is a migration: both ends say failed, the guest runs on."""

    def raises() -> Placement:
        raise RuntimeError("no processors today")

    with nothing_left(), pair(ram_bytes=RAM_BYTES, rate=500) as (source, target):
        target.service.settings.choose_placement = raises
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.machine.start()
        source.service.migrate(uri)
        assert target.service.wait(60) == "failed"
        assert target.service.query()["error-desc"] == "no processors today"
        assert source.service.wait(60) == "failed"
        assert_runs_on(source)
        source.assert_sweep_clean()
