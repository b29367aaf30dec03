"""Limits of control groups, found where the kernel keeps them: real groups with a child inside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem.cgroups import memory_limit
from tests.support.guestmem_memory import HUGE, more_hugepages
from tests.support.need import need

pytestmark = pytest.mark.kernel

ROOTS = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*")]


def _v1(controller: str) -> Path | None:
    found = Path("/sys/fs/cgroup") / controller
    return found if (found / "cgroup.procs").exists() and found.name == controller else None


def _v2(controller: str) -> Path | None:
    for root in ROOTS:
        with contextlib.suppress(OSError):
            if controller in (root / "cgroup.controllers").read_text().split():
                return root
    return None


@contextlib.contextmanager
def group(controller: str, tmp: Path) -> Iterator[tuple[Path, bool]]:
    """A group of our own; whether it is of version 2."""
    need(os.geteuid() == 0, "control groups need root", remedy="sudo -E python -m pytest")
    v1, v2 = _v1(controller), _v2(controller)
    need(v1 or v2, f"no cgroup controller {controller!r} is mounted here")
    root = v1 or v2
    assert root is not None
    made = root / f"postcopy-test-{os.getpid()}-{tmp.name}"
    try:
        if v1 is None:
            (root / "cgroup.subtree_control").write_text(f"+{controller}")
        made.mkdir()
    except OSError as error:
        need(False, f"no cgroup can be made in {root}: {error}")
    try:
        yield made, v1 is None
    finally:
        made.rmdir()


def inside(made: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the group; it joins before it starts."""
    script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    return subprocess.run(
        ["sh", "-c", script, str(made), sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_memory(tmp_path: Path) -> None:
    with group("memory", tmp_path) as (made, is_v2):
        name = "memory.max" if is_v2 else "memory.limit_in_bytes"
        (made / name).write_text(str(96 << 20))
        code = (
            "from guestmem.cgroups import memory_limit as f; l = f();"
            "print(l.group, l.file, l.maximum, 0 < l.used < l.maximum, l.left < 96 << 20)"
        )
        done = inside(made, "-c", code)
        assert done.stdout.split() == [str(made), name, str(96 << 20), "True", "True"], done.stderr
    limit = memory_limit()
    assert limit is None or limit.group != made


def test_huge_pages_beyond_the_limit_are_explained(tmp_path: Path) -> None:
    """The pool has them and the group may not: said, with the file to change."""
    with more_hugepages(6, tmp_path / "journal"), group("hugetlb", tmp_path) as (made, is_v2):
        kind = "max" if is_v2 else "limit_in_bytes"
        name = f"hugetlb.2MB.rsvd.{kind}"
        need((made / name).exists(), "this kernel limits no reservations of huge pages (Linux 5.7)")
        (made / name).write_text(str(2 * HUGE))
        code = (
            "from guestmem import *\n"
            "RAMBlock.allocate('small', 2 << 20, backing=Backing.HUGETLB).close()\n"
            "try: RAMBlock.allocate('ram', 8 << 20, backing=Backing.HUGETLB)\n"
            "except HugepagesShort as error: print(error.pages_needed, error.pages_free, error)"
        )
        done = inside(made, "-c", code)
    assert done.stdout.startswith("4 2 block 'ram' needs 4 huge pages of 2 MiB"), done
    assert f"cgroup {made} allows 4 MiB" in done.stdout
    assert f"raise {made}/{name} by 4M" in done.stdout
