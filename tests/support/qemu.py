"""A stock QEMU as the peer and the judge: found, started, asked through QMP, read out, ended.

The usual guest is ``-M none``: no CPU, no devices, one RAM block called ``ram``. Its RAM is filled
by QEMU's own generic loader and read out with ``pmemsave``, so a test compares what QEMU holds with
what it was given. ``pmemsave`` on a postcopy destination touches missing pages and waits for them:
it is also the way to make a real QEMU fault.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.support.need import need
from tests.support.process import end, tied_to_us
from tests.support.qmp import Message, QmpClient, QmpClosed, QmpError

INSTALL = "apt-get install qemu-system-x86"
MIB = 1 << 20
PAGE_BYTES = 4096

# The statuses in which a migration does not move on by itself any more.
_FINAL = frozenset({"completed", "failed", "cancelled", "postcopy-paused"})


@dataclass(frozen=True)
class QemuBinary:
    """One QEMU on this host: ``name`` for the test id, ``argv`` up to its first own option."""

    name: str
    argv: tuple[str, ...]
    version: tuple[int, int]

    def __str__(self) -> str:
        return self.name


@functools.cache
def installed_qemu() -> QemuBinary | None:
    """The distribution's QEMU (7.2 on Debian 12, 10.0 on Debian 13), or ``None``."""
    path = shutil.which("qemu-system-x86_64")
    return _identify((path,)) if path else None


@functools.cache
def newer_qemu() -> QemuBinary | None:
    """QEMU 10.0 beside the installed one: from ``make qemu-10``, or where ``QEMU_10`` points.

    ``QEMU_10`` is a folder that Debian's packages were unpacked into; its ``usr/share/qemu`` and
    the installed firmware folders are put on QEMU's search path.
    """
    root = Path(os.environ.get("QEMU_10") or _cache_folder() / "qemu-10")
    binary = root / "usr/bin/qemu-system-x86_64"
    if not os.access(binary, os.X_OK):
        return None
    folders = (str(root / "usr/share/qemu"), "/usr/share/seabios", "/usr/lib/ipxe/qemu")
    return _identify((str(binary), *(part for folder in folders for part in ("-L", folder))))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postcopy"


def _identify(argv: tuple[str, ...]) -> QemuBinary | None:
    """Ask the binary for its version; one that cannot even do that (missing library) is no QEMU."""
    answer = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=False)
    words = answer.stdout.split()
    if answer.returncode != 0 or "version" not in words:
        return None
    major, minor = words[words.index("version") + 1].split(".")[:2]
    return QemuBinary(f"qemu-{major}.{minor}", argv, (int(major), int(minor)))


@pytest.fixture(params=["installed", "newer"])
def qemu_binary(request: pytest.FixtureRequest) -> QemuBinary:
    """Each QEMU of this host in turn. Import it into a test module to use it there."""
    if request.param == "installed":
        return require_qemu()
    binary, first = newer_qemu(), installed_qemu()
    # No remedy on purpose: a second QEMU is a bonus, its absence fails no host's promise.
    need(binary, "no second QEMU (10.0) unpacked: `make qemu-10` does it where there is a mirror")
    assert binary is not None
    if first is not None and first.version == binary.version:
        pytest.skip(f"the installed QEMU is {first.name} already")
    return binary


def require_qemu() -> QemuBinary:
    """The installed QEMU; the test is skipped (or fails, see ``need``) without one."""
    binary = installed_qemu()
    need(binary, "no qemu-system-x86_64 on this host", remedy=INSTALL)
    assert binary is not None
    return binary


def pattern_page(page_index: int, *, seed: str = "1", zero_every: int = 4) -> bytes:
    """One page like no other: zero at every ``zero_every``-th index, else a repeated digest.

    The recorded streams use the same rule, so live and recorded RAM compare directly.
    """
    if page_index % zero_every == 0:
        return bytes(PAGE_BYTES)
    return hashlib.sha256(f"{seed}/{page_index}".encode()).digest() * (PAGE_BYTES // 32)


def pattern(page_count: int, *, seed: str = "1", zero_every: int = 4) -> bytes:
    """``page_count`` pages of :func:`pattern_page`, from index 0."""
    return b"".join(
        pattern_page(index, seed=seed, zero_every=zero_every) for index in range(page_count)
    )


class Qemu:
    """One running QEMU, with its monitor connected. Leaving the ``with`` block ends the process.

    :param binary: which QEMU.
    :param ram_bytes: guest RAM; a multiple of 1 MiB.
    :param machine: QEMU's machine type.
    :param incoming: ``None`` for a source; ``"defer"`` or an URI for a destination.
    :param load: initial RAM contents as ``{guest address: bytes}``, put there by QEMU's loader.
    :param args: further arguments, unchanged.
    """

    def __init__(
        self,
        binary: QemuBinary,
        *,
        ram_bytes: int = 2 * MIB,
        machine: str = "none",
        incoming: str | None = None,
        load: Mapping[int, bytes] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        self.binary = binary
        self.ram_bytes = ram_bytes
        # Short on purpose: a unix socket's path holds 107 bytes, pytest's folders are long.
        self.folder = Path(tempfile.mkdtemp(prefix="qemu-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: QmpClient | None = None
        try:
            self._start(machine, incoming, load or {}, args)
        except BaseException:
            self.close()
            raise

    def _start(
        self, machine: str, incoming: str | None, load: Mapping[int, bytes], args: Sequence[str]
    ) -> None:
        argv = [*self.binary.argv, "-M", machine, "-m", f"{self.ram_bytes // MIB}M"]
        argv += ["-nodefaults", "-no-user-config", "-display", "none"]
        for address, data in load.items():
            file = self.folder / f"load-{address:x}"
            file.write_bytes(data)
            argv += ["-device", f"loader,file={file},addr={address:#x},force-raw=on"]
        if incoming is not None:
            argv += ["-incoming", incoming]
        # QEMU gets a socket that listens already: connecting needs no retries, and a QEMU that dies
        # at start shows as a closed connection.
        monitor_path = str(self.folder / "qmp")
        with socket.socket(socket.AF_UNIX) as monitor, open(self._stderr, "wb") as log:
            monitor.bind(monitor_path)
            monitor.listen(1)
            number = monitor.fileno()
            argv += ["-chardev", f"socket,id=qmp,fd={number},server=on,wait=off"]
            argv += ["-mon", "chardev=qmp,mode=control", *args]
            self._process = subprocess.Popen(
                tied_to_us(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[number],
            )
        try:
            self._qmp = QmpClient(monitor_path)
        except (QmpClosed, ConnectionRefusedError) as error:
            raise RuntimeError(f"{self.binary} did not start: {self.stderr()}") from error

    @property
    def qmp(self) -> QmpClient:
        """The monitor."""
        assert self._qmp is not None
        return self._qmp

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process; ``.pid`` for /proc."""
        assert self._process is not None
        return self._process

    @property
    def _stderr(self) -> Path:
        return self.folder / "stderr"

    def stderr(self) -> str:
        """What QEMU said on stderr so far."""
        return self._stderr.read_text(errors="replace") if self._stderr.exists() else ""

    def execute(self, command: str, **arguments: Any) -> Any:
        """One QMP command; underscores in argument names become hyphens."""
        return self.qmp.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    def set_capabilities(self, *names: str) -> None:
        """Switch migration capabilities on, ``events`` always among them: tests wait for events."""
        wanted = dict.fromkeys(("events", *names), True)
        self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": on} for name, on in wanted.items()],
        )

    def set_parameters(self, **values: Any) -> None:
        """``migrate-set-parameters``; ``max_bandwidth=1000000`` and so on."""
        self.execute("migrate-set-parameters", **values)

    def query_migrate(self) -> Message:
        """``query-migrate`` as QEMU answers it; ``{}`` before any migration."""
        answer: Message = self.execute("query-migrate")
        return answer

    def wait_status(self, *statuses: str, timeout_s: float = 60.0) -> str:
        """Wait for one of the migration statuses by its event (see :meth:`set_capabilities`).

        :raises AssertionError: the migration came to rest in another status first.
        """
        stop = _FINAL | set(statuses)
        try:
            data = self.qmp.wait_event(
                "MIGRATION", lambda d: d["status"] in stop, timeout_s=timeout_s
            )
        except (TimeoutError, QmpClosed) as error:
            raise AssertionError(f"waiting for {statuses}: {error}; {self.state()}") from error
        status = str(data["status"])
        assert status in statuses, f"{status} instead of {statuses}: {self.state()}"
        return status

    def read_ram(self, offset: int, length: int) -> bytes:
        """Guest memory at a physical address, as QEMU sees it. Faults in what is missing."""
        file = self.folder / "pmem"
        self.execute("pmemsave", val=offset, size=length, filename=str(file))
        return file.read_bytes()

    def ram(self) -> bytes:
        """All of guest RAM (of a machine whose RAM is one block at address 0)."""
        return self.read_ram(0, self.ram_bytes)

    def state(self) -> str:
        """All there is to know about this QEMU, for a failure's message."""
        code = self.process.poll()
        lines = [f"{self.binary} pid {self.process.pid}, exit code {code}"]
        if self._qmp is not None:
            lines.append(f"events: {' '.join(self._qmp.event_names())}")
            if code is None:
                try:
                    lines.append(f"query-migrate: {self.qmp.execute('query-migrate', timeout_s=2)}")
                except (OSError, QmpError) as error:
                    lines.append(f"monitor: {error}")
        lines.append(f"stderr: {self.stderr().strip()}")
        return "\n".join(lines)

    def wait_exit(self, *, timeout_s: float = 30.0) -> int:
        """Wait until the process ends by itself; its exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, as a host would die. The folder stays until :meth:`close`."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the process if it runs, remove its folder. Twice is fine."""
        if self._qmp is not None:
            self._qmp.close()
        if self._process is not None:
            end(self._process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and hasattr(error, "add_note"):
            error.add_note(self.state())
        self.close()
