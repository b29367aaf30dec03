"""Policies of a user's own: loaded by name, asked, followed, and harmless when they fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from migration.engine.policy import Decision, Observed, PageRange, Progress
from migration.runtime.errors import MigrationError
from migration.runtime.policies import load_policy
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.pair import MIB, Side, pair

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "policy.py"


class Backwards:
    """Everything, from the end to the beginning, page by page."""

    def __init__(self) -> None:
        self.calls: list[Observed] = []

    def next_pages(self, observed: Observed) -> Sequence[PageRange]:
        self.calls.append(observed)
        if len(self.calls) > 1:
            return []
        return [
            PageRange(idstr, page, 1)
            for idstr, pages in observed.page_counts.items()
            for page in reversed(range(pages))
        ]


def migrate(source: Side, target: Side, folder: Path) -> None:
    source.machine.start()
    target.service.migrate_incoming(f"unix:{folder}/m")
    migrate_by_postcopy(source.service, f"unix:{folder}/m")
    assert source.service.wait(60) == "completed", source.service.query()
    assert target.service.wait(60) == "completed", target.service.query()
    target.assert_sweep_clean()


def test_pages_are_pushed_in_the_order_a_policy_says(tmp_path: Path) -> None:
    policy = Backwards()
    with pair(ram_bytes=16 * MIB, rate=200) as (source, target):
        source.service.policy = policy
        migrate(source, target, tmp_path)
        pages = source.machine.ram.total_length >> 12
        # Nearly all of them: the scan had little to do before the first advice came.
        assert source.figures["advised-pages"] > pages // 2
        assert policy.calls[0].page_counts == {"toy.ram": pages}
        assert policy.calls[0].remaining <= pages


def test_a_policy_hears_of_requests_while_they_are_answered(tmp_path: Path) -> None:
    """The example that pushes what lies around each requested page."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        source.service.policy = load_policy(f"{EXAMPLES}:Neighbours")
        # Slow enough in the background for the guest to ask.
        source.service.set_parameters({"max-postcopy-bandwidth": 8 * MIB})
        migrate(source, target, tmp_path)
        assert target.figures["page-requests"] > 0
        assert source.figures["advised-pages"] > 0


def test_a_policy_may_switch_over_by_itself(tmp_path: Path) -> None:
    with pair(ram_bytes=8 * MIB) as (source, target):
        source.service.policy = load_policy(f"{EXAMPLES}:TwoPasses")
        source.service.set_parameters({"downtime-limit": 0, "max-bandwidth": 24 * MIB})
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.machine.start()
        source.service.migrate(listening)
        assert source.service.wait(60) == "completed", source.service.query()
        assert "postcopy-active" in source.statuses
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


class Broken:
    """Raises whatever it is asked."""

    def __init__(self) -> None:
        self.decide = lambda progress: Decision(progress.remaining + 99)
        self.next_pages = None


class BrokenPush:
    def next_pages(self, observed: Observed) -> Sequence[PageRange]:
        return [PageRange("toy.ram", observed.page_counts["toy.ram"], 1)]


class AlwaysPostcopy:
    def decide(self, progress: Progress) -> Decision:
        return Decision.POSTCOPY


def test_a_push_policy_that_fails_is_left_out(tmp_path: Path) -> None:
    with pair(ram_bytes=8 * MIB, rate=500) as (source, target):
        source.service.policy = BrokenPush()
        migrate(source, target, tmp_path)
        failed = [data for name, data in source.events if name == "X_POLICY_FAILED"]
        assert len(failed) <= 1  # a short migration may be over before it was asked


@pytest.mark.parametrize("policy", [Broken(), AlwaysPostcopy()])
def test_a_switchover_policy_that_fails_keeps_the_guest_here(
    policy: object, tmp_path: Path
) -> None:
    with pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        source.service.policy = policy
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.machine.start()
        source.service.migrate(listening)
        assert source.service.wait(60) == "failed"
        assert type(policy).__name__ in str(source.service.query()["error-desc"])
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("nothing", "MODULE:CLASS"),
        ("no_such_module:Policy", "no_such_module"),
        ("nowhere.py:Policy", "nowhere"),
        ("migration.engine.policy:Nobody", "Nobody"),
        ("collections:OrderedDict", "neither 'decide' nor 'next_pages'"),
        (f"{EXAMPLES}:Missing", "Missing"),
    ],
)
def test_what_is_no_policy_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(MigrationError, match=reason):
        load_policy(spec)


def test_a_module_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_policy.py").write_text(EXAMPLES.read_text())
    monkeypatch.chdir(tmp_path)
    assert load_policy("my_own_policy:TwoPasses")
