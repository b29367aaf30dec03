"""Programs to be changed from outside, and how to tell that they are well."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from migration.tracee import ptracing
from migration.tracee.mappings import ProcessMapping, mappings
from migration.tracee.memory import userfaultfds
from tests.support.need import need
from tests.support.process import end, tied_to_us

_SOURCE = Path(__file__).with_name("tracee_target.c")
HUGE = 2 << 20
TIMEOUT_S = 60.0


@cache
def _binary() -> Path:
    cc = shutil.which("cc") or shutil.which("gcc")
    need(cc, "no C compiler", remedy="apt-get install gcc libc6-dev")
    assert cc is not None
    folder = Path(tempfile.mkdtemp(prefix="tracee-"))
    binary = folder / "target"
    subprocess.run([cc, "-O1", "-pthread", "-o", binary, _SOURCE], check=True)
    return binary


class Target:
    """The checking program of ``tracee_target.c``, running."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        assert process.stdout is not None
        self._out = process.stdout
        self.start = int(self._out.readline(), 16)

    def assert_well(self) -> None:
        """All threads run and have found nothing wrong; its main thread gets on."""
        os.set_blocking(self._out.fileno(), False)
        self._out.read()
        self.wait_word(".")
        states = [line for line in self._status() if line.startswith("State")]
        assert "T" not in states[0].split()[1].upper(), states

    def wait_word(self, wanted: str) -> None:
        """Until it or a child of its says so, and nothing wrong before."""
        os.set_blocking(self._out.fileno(), False)
        until = time.monotonic() + TIMEOUT_S
        said = ""
        while wanted not in said:
            said += (self._out.read() or b"").decode()
            assert set(said) <= {".", wanted}, said
            assert self.process.poll() is None, self.process.returncode
            assert time.monotonic() < until, f"no {wanted!r} in {said!r}"
            time.sleep(0.01)

    def _status(self) -> list[str]:
        return Path(f"/proc/{self.pid}/status").read_text().splitlines()

    def mapping(self, address: int) -> ProcessMapping:
        """Its mapping at ``address``."""
        return next(m for m in mappings(self.pid) if m.start <= address < m.end)

    @property
    def total(self) -> int:
        """Bytes of all its mappings."""
        return sum(m.length for m in mappings(self.pid))

    def wait_quiet(self, total: int) -> None:
        """Until nobody watches its memory, it holds no userfaultfd, and ``total`` bytes are mapped:
        a keeper may still be taking away what a dead tracer left."""
        until = time.monotonic() + TIMEOUT_S
        while (
            self.total != total
            or any(m.uffd_modes for m in mappings(self.pid))
            or userfaultfds(self.pid)
        ):
            assert time.monotonic() < until, (total, mappings(self.pid))
            time.sleep(0.01)


@contextlib.contextmanager
def target(length: int) -> Iterator[Target]:
    """One running with ``length`` bytes of memory to check."""
    argv = tied_to_us([str(_binary()), str(length)])
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        yield Target(process)
    finally:
        end(process)


def killed_at_request(number: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that SIGKILLs itself right after its ``number``-th ptrace request.

    :returns: whether it came that far; False: it had finished before.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _die_at(number)
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def _die_at(number: int) -> None:
    request, made = ptracing._request, 0

    def counted(*arguments: int) -> None:
        nonlocal made
        request(*arguments)
        made += 1
        if made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    ptracing._request = counted  # type: ignore[assignment]
