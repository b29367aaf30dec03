"""The part of the C driver that needs huge pages, which the run of all drivers does not provide."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.native.run_drivers import SKIPPED, build, compiler
from tests.support.guestmem_memory import more_hugepages
from tests.support.need import need

DRIVER = Path(__file__).parent / "guestmem_driver.c"


@pytest.mark.kernel
def test_no_write_to_huge_pages_is_lost(tmp_path: Path) -> None:
    """The dirty scan against a racing writer, as sanitized C."""
    need(compiler(), "no C compiler", remedy="apt-get install gcc libc6-dev")
    program = build(DRIVER, "address", into=tmp_path)
    with more_hugepages(8, tmp_path / "journal"):
        done = subprocess.run(
            [program, "race-hugetlb"],
            capture_output=True,
            text=True,
            check=False,
        )
    need(done.returncode != SKIPPED, "no asynchronous write protection (Linux 6.7)")
    assert done.returncode == 0, done.stdout + done.stderr
