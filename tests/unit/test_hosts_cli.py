"""What ``scripts/vagrant-hosts`` makes beforehand ends with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.hosts import cli
from tests.support.process import end

TIMEOUT_S = 30.0
_BUILD = "trap 'touch removed; exit 1' INT; touch begun; sleep 600 & wait"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_removes_its_things_when_we_are_ended(tmp_path: Path, number: int) -> None:
    program = (
        "import signal, sys; from scripts.hosts import cli;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        f"cli._made('sh', '-c', {_BUILD!r})"
    )
    line = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {program}"]
    process = subprocess.Popen(line, cwd=cli.PROJECT, env={"PYTHONPATH": str(cli.PROJECT)})
    try:
        until = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) != 0
        assert (tmp_path / "removed").exists()
    finally:
        end(process)


def test_what_it_prints_and_that_it_failed() -> None:
    assert cli._made("echo", "a box") == "a box"
    with pytest.raises(subprocess.CalledProcessError):
        cli._made("false")
