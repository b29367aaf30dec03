"""Children of a test: ended by their own pid, gone with the test run even if it is killed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence


def tied_to_us(argv: Sequence[str]) -> list[str]:
    """``argv`` run so that the kernel kills it when the thread that started it ends.

    The watchdog of ``tests/conftest.py`` ends pytest without clean-up; a QEMU left behind by that
    would hold sockets and hugepages of the next run. Start such children from the main thread, or
    from one that outlives them: prctl(2), PR_SET_PDEATHSIG counts the thread, not the process.
    """
    setpriv = shutil.which("setpriv")  # util-linux; present on every Debian
    return [setpriv, "--pdeathsig", "KILL", "--", *argv] if setpriv else list(argv)


def end(process: subprocess.Popen[bytes], *, timeout_s: float = 5.0) -> int:
    """Make sure ``process`` is over: SIGTERM, then SIGKILL. Returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return code
