"""Huge page pools: taking pages, and giving back exactly those, also after a crash."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guestmem import Backing, GuestMemoryError, HugepagesShort, RAMBlock, hugepages
from guestmem.hugejournal import HugepageJournal, noted
from guestmem.pools import HugepagePool, nodes, page_sizes
from tests.support.guestmem_memory import HUGE, more_hugepages, pool_lock

pytestmark = pytest.mark.kernel


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[HugepagePool]:
    """The 2 MiB pool, two pages of which somebody else has put there; nobody else changes it."""
    with more_hugepages(2, tmp_path / "somebody") as pool, pool_lock():
        before = pool.state().persistent
        yield pool
        assert pool.state().persistent == before


@pytest.fixture
def journal(tmp_path: Path) -> HugepageJournal:
    return HugepageJournal(tmp_path / "journal")


def test_what_was_taken_goes_back(pool: HugepagePool, journal: HugepageJournal) -> None:
    before = pool.state()
    first, second = journal.take(2, HUGE), journal.take(1, HUGE)
    assert pool.state().persistent == before.persistent + 3
    assert journal.entries() == [first, second]
    assert journal.give_back(first.id) == [first]
    assert pool.state().persistent == before.persistent + 1
    assert journal.give_back() == [second]
    assert journal.give_back() == []
    assert pool.state().persistent == before.persistent


def test_others_changes_are_left_alone(pool: HugepagePool, journal: HugepageJournal) -> None:
    """The pool grew by somebody else's page in between: that page stays."""
    journal.take(1, HUGE)
    total = pool.state().persistent
    pool.set_persistent(total + 1)
    journal.give_back()
    assert pool.state().persistent == total
    pool.set_persistent(total - 1)


def test_a_node_of_its_own(pool: HugepagePool, journal: HugepageJournal) -> None:
    node = nodes()[0]
    on_node = HugepagePool(HUGE, node)
    before = on_node.state().persistent
    journal.take(1, HUGE, node=node)
    assert on_node.state().persistent == before + 1
    journal.give_back()
    assert on_node.state().persistent == before


def test_a_with_block_gives_back(pool: HugepagePool, journal: HugepageJournal) -> None:
    before = pool.state().persistent
    with journal.taken(1, HUGE):
        assert pool.state().persistent == before + 1
        assert journal.give_back() == []  # its owner, this process, is alive
    assert pool.state().persistent == before


def test_pages_of_a_dead_owner_go_back(pool: HugepagePool, journal: HugepageJournal) -> None:
    """A process takes pages and is killed: the next give-back finds them in the journal."""
    before = pool.state().persistent
    code = (
        "import os, sys; from pathlib import Path; from guestmem.hugejournal import *;"
        "HugepageJournal(Path(sys.argv[1])).take(1, 2 << 20, owned=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(journal.directory)]
    assert subprocess.run(command, check=False).returncode == -9
    assert pool.state().persistent == before + 1
    (entry,) = journal.give_back()
    assert (entry.taken, entry.owner_is_alive) == (1, False)
    assert pool.state().persistent == before


@pytest.mark.parametrize("grown", [0, 1])
def test_a_crash_in_the_middle_of_taking(
    pool: HugepagePool, journal: HugepageJournal, grown: int
) -> None:
    """Only the intent was written; whether the pool had grown already, the pool itself tells."""
    before = pool.state().persistent
    taking = journal.take(1, HUGE)
    path = next(journal.directory.glob("*.json"))
    (record,) = json.loads(path.read_text())
    path.write_text(json.dumps([record | {"taken": None}]))
    pool.set_persistent(before + grown)
    (entry,) = journal.entries()
    assert (entry.id, entry.taken) == (taking.id, grown)
    journal.give_back()
    assert pool.state().persistent == before


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_crash_in_the_middle_of_giving_back(
    pool: HugepagePool,
    journal: HugepageJournal,
    given: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is given back twice, which would take somebody else's pages away."""

    class Crash(BaseException):
        pass

    def shrink_and_crash(pool: HugepagePool, pages: int) -> int:
        path = pool.directory / "nr_hugepages"
        path.write_text(str(before + 2 - given))
        raise Crash

    before = pool.state().persistent
    journal.take(2, HUGE)
    with monkeypatch.context() as patch:
        patch.setattr(HugepagePool, "set_persistent", shrink_and_crash)
        with pytest.raises(Crash):
            journal.give_back()
    assert [entry.taken for entry in journal.entries()] == [2 - given]
    journal.give_back()
    assert pool.state().persistent == before
    assert journal.entries() == []


def test_two_journals_do_not_lose_each_others_pages(pool: HugepagePool, tmp_path: Path) -> None:
    """Each reads the pool's size and writes a new one, hundreds of times at the same time."""

    def take_and_give(name: str) -> None:
        journal = HugepageJournal(tmp_path / name)
        for _ in range(100):
            with journal.taken(1, HUGE):
                pass

    before = pool.state().persistent
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(take_and_give, ("one", "other")))
    assert pool.state().persistent == before


def test_who_may_only_look_sees_what_root_took(pool: HugepagePool, tmp_path: Path) -> None:
    """Another user is shown the takings, and is told to be root where that is what is missing."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        os.chmod(folder, 0o755)
        journal = HugepageJournal(Path(folder))
        taking = journal.take(1, HUGE)
        pid = os.fork()
        if pid == 0:
            try:
                os.setuid(65534)
                assert noted(Path(folder)) == [taking]
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        journal.give_back()


def test_no_place_for_a_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(GuestMemoryError, match="run as root"):
        HugepageJournal()


def test_entries_of_an_earlier_boot_are_dropped(
    pool: HugepagePool, journal: HugepageJournal
) -> None:
    before = pool.state().persistent
    journal.take(1, HUGE)
    path = next(journal.directory.glob("*.json"))
    (record,) = json.loads(path.read_text())
    path.write_text(json.dumps([record | {"boot": "another"}]))
    assert journal.entries() == []
    assert journal.give_back() == []
    pool.set_persistent(before)


def test_pages_in_use_are_freed_with_their_user(
    pool: HugepagePool, journal: HugepageJournal
) -> None:
    before = pool.state()
    journal.take(1, HUGE)
    pages = pool.state().available
    with RAMBlock.allocate("ram", pages * HUGE, backing=Backing.HUGETLB) as block:
        block.fill(0, block.used_length, 1)
        journal.give_back()
        assert pool.state().surplus >= 1
        assert block.read(0, 1) == b"\x01"
    assert pool.state() == before


def test_more_than_the_host_has_is_refused_unasked(journal: HugepageJournal) -> None:
    before = HugepagePool(HUGE).state()
    with pytest.raises(GuestMemoryError, match="MiB available") as caught:
        journal.take(1 << 40, HUGE)
    assert caught.value.errno == errno.ENOMEM
    assert HugepagePool(HUGE).state().persistent >= before.persistent
    assert journal.entries() == []
    with pytest.raises(GuestMemoryError, match="no pool of 8 MiB"):
        journal.take(1, 8 << 20)
    with pytest.raises(ValueError, match="cannot take"):
        journal.take(0, HUGE)


def test_the_command(
    pool: HugepagePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--journal", str(tmp_path / "j"), "--json"]
    before = pool.state().persistent
    assert hugepages.main(["reserve", "1", *options]) == 0
    (taken,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert taken == {"id": 1, "size": "2M", "node": None, "pages": 1, "state": "taken"}
    assert hugepages.main(["show", *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (row,) = (row for row in rows if row.get("pool") == "2M" and row["node"] is None)
    assert row["total"] - row["surplus"] == before + 1
    assert rows[-1] == taken
    assert hugepages.main(["give-back", *options]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "given back"
    assert hugepages.main(["give-back", "9", *options]) == 1
    assert "9" in capsys.readouterr().err
    assert hugepages.main(["reserve", "0", *options]) == 1
    assert hugepages.main(["show", *options[:2]]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 MiB" in captured.err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        hugepages.main(["--help"])
    assert caught.value.code == 0
    assert "give-back" in capsys.readouterr().out
    assert page_sizes() == sorted(page_sizes())


def test_surplus_is_allowed_used_and_taken_back(
    pool: HugepagePool, journal: HugepageJournal
) -> None:
    """A pool too small for the block, and a kernel that may make the rest."""
    before = pool.state()
    pages = before.available + 2
    with pytest.raises(HugepagesShort) as caught:
        RAMBlock.allocate(
            "ram", (pages + before.obtainable) * HUGE, backing=Backing.HUGETLB
        ).close()
    assert "postcopy hugepages reserve" in str(caught.value)
    taking = journal.take(2, HUGE, surplus=True)
    assert pool.state().overcommit == before.overcommit + 2
    with RAMBlock.allocate("ram", pages * HUGE, backing=Backing.HUGETLB) as block:
        assert pool.state().surplus >= before.surplus + 2
        block.fill(0, block.used_length, 7)
    assert journal.give_back(taking.id) == [taking]
    assert pool.state().overcommit == before.overcommit
    with pytest.raises(ValueError, match="name no node"):
        journal.take(1, HUGE, surplus=True, node=0)


def test_the_owner_may_be_another_process(pool: HugepagePool, journal: HugepageJournal) -> None:
    """A shell that will give back itself: a general give-back leaves its pages alone."""
    with subprocess.Popen(["sleep", "60"]) as owner:
        journal.take(1, HUGE, owner_pid=owner.pid)
        assert journal.give_back() == []
        owner.kill()
    assert len(journal.give_back()) == 1
