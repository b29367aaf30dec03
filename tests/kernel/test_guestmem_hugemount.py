"""File systems of huge pages: made, found, used, unmounted, and only ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from guestmem import Backing, GuestMemoryError, RAMBlock, hugepages
from guestmem.hugemount import find_mount, make_mount, mounts, unmount
from guestmem.pools import page_sizes
from tests.support.guestmem_memory import HUGE, more_hugepages, mounted
from tests.support.need import need

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def root() -> None:
    need(os.geteuid() == 0, "mounting needs root", remedy="sudo -E python -m pytest")
    need(HUGE in page_sizes(), "this kernel has no 2 MiB pages")


def test_made_used_and_gone(tmp_path: Path) -> None:
    where = tmp_path / "a b"  # mountinfo escapes the space
    made = make_mount(HUGE, where)
    assert (made.directory, made.page_size, made.is_ours) == (where, HUGE, True)
    assert made in mounts()
    assert find_mount(HUGE) is not None
    with more_hugepages(2, tmp_path / "journal"):
        with RAMBlock.allocate(
            "ram", HUGE, backing=Backing.FILE, path=str(where), hugepage_size=HUGE
        ) as block:
            assert block.is_hugetlb
            with pytest.raises(GuestMemoryError, match="unmounting") as caught:
                unmount(where)
            assert "end who uses it" in str(caught.value)
        assert unmount(where) == [made]
    assert made not in mounts()
    assert not where.exists()


def test_a_directory_may_be_named_relatively_and_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    made = make_mount(HUGE, Path("link/m"))
    assert made.directory == tmp_path / "real" / "m"
    assert unmount(Path("real/../link/m")) == [made]


def test_what_others_mounted_stays(tmp_path: Path) -> None:
    with mounted("hugetlbfs", "pagesize=2M", tmp_path / "theirs") as theirs:
        assert [each.is_ours for each in mounts() if each.directory == theirs] == [False]
        with pytest.raises(GuestMemoryError, match="was not mounted by"):
            unmount(theirs)
        assert theirs in [each.directory for each in mounts()]


def test_a_size_there_is_not() -> None:
    with pytest.raises(GuestMemoryError, match="no huge pages of 8 MiB"):
        make_mount(8 << 20)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(tmp_path / "m")
    options = ["--journal", str(tmp_path / "j"), "--json"]
    assert hugepages.main(["mount", where, *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"mount": where, "size": "2M", "state": "made"}
    assert hugepages.main(["show", *options]) == 0
    assert where in capsys.readouterr().out
    assert hugepages.main(["unmount", where, *options]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "unmounted"
    assert hugepages.main(["unmount", where, *options]) == 1
    assert where in capsys.readouterr().err
