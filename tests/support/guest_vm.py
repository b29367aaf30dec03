"""A stock QEMU with the checking guest inside: started, watched on its serial port, ended."""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.support.guest_image import GuestLayout, guest_image
from tests.support.qemu import MIB, Qemu, QemuBinary

TIMEOUT_S = 60.0
BACKINGS = ("anon", "memfd", "hugetlb")
BLOCK = "pc.ram"


class SerialPort:
    """Everything the guest says; a thread reads it all, for a full socket would stop the guest."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "serial")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen(1)
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None
        self.lines: list[str] = []
        self._passes = 0
        self._complaints: list[str] = []
        self._thread = threading.Thread(target=self._read, name="guest-serial", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._socket, _ = self._listening.accept()
            rest = b""
            while data := self._socket.recv(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                with self._changed:
                    for line in lines:
                        self._note(line.decode("latin-1").strip())
                    self._changed.notify_all()
        except OSError:
            return

    def _note(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith("P "):
            self._passes += 1
        elif line.startswith(("B", "X")):
            self._complaints.append(line)

    @property
    def passes(self) -> int:
        """How many passes were finished while this QEMU ran it."""
        return self._passes

    @property
    def complaints(self) -> list[str]:
        """Wrong words the guest found."""
        with self._changed:
            return list(self._complaints)

    def wait_passes(self, count: int, *, timeout_s: float = TIMEOUT_S) -> None:
        """Until the guest finished ``count`` passes more, or complained."""
        with self._changed:
            wanted = self._passes + count
            came = self._changed.wait_for(
                lambda: self._passes >= wanted or self._complaints, timeout_s
            )
            assert came, f"{self._passes} of {wanted} passes; last: {self.lines[-3:]}"
            assert not self._complaints, self._complaints[:5]

    def wait_line(self, start: str, *, timeout_s: float = TIMEOUT_S) -> str:
        """The next line that begins so, from now on."""
        with self._changed:
            seen = len(self.lines)
            came = self._changed.wait_for(
                lambda: any(line.startswith(start) for line in self.lines[seen:]), timeout_s
            )
            assert came, f"no line {start!r}; last: {self.lines[-3:]}"
            return next(line for line in self.lines[seen:] if line.startswith(start))

    def close(self) -> None:
        """Stop reading. QEMU must have ended or does not mind."""
        for end in (self._listening, self._socket):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._thread.join(5)


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What kind of VM: the same at every QEMU the guest visits, but for ``backing`` and ``accel``.

    :ivar machine: a machine type every QEMU involved knows.
    :ivar kernel: another guest than the checking one.
    """

    layout: GuestLayout
    backing: str = "anon"
    accel: str = "tcg"
    machine: str = "pc-i440fx-7.2"
    args: Sequence[str] = field(default=())
    kernel: Path | None = None


class GuestVM(Qemu):
    """One QEMU, with the guest (``incoming=None``) or waiting for it."""

    def __init__(
        self,
        binary: QemuBinary,
        options: GuestOptions,
        *,
        incoming: str | None = None,
        paused: bool = False,
    ) -> None:
        self._serial_folder = Path(tempfile.mkdtemp(prefix="serial-"))
        self.serial = SerialPort(self._serial_folder)
        self.options = options
        self.monitor = str(self._serial_folder / "qmp")
        ram = options.layout.ram_bytes
        args = [
            *("-object", _backend(options.backing, ram)),
            *("-accel", options.accel),
            *("-kernel", str(options.kernel or guest_image(options.layout))),
            *("-chardev", f"socket,id=serial,path={self.serial.path}"),
            *("-serial", "chardev:serial"),
            # A second monitor, for verbs that ask the QEMU themselves.
            *("-qmp", f"unix:{self.monitor},server=on,wait=off"),
            *options.args,
        ]
        if paused:
            args.append("-S")
        try:
            super().__init__(
                binary,
                ram_bytes=ram,
                machine=f"{options.machine},memory-backend={BLOCK}",
                incoming=incoming,
                args=args,
            )
        except BaseException:
            self.serial.close()
            shutil.rmtree(self._serial_folder, ignore_errors=True)
            raise

    def run_state(self) -> str:
        """``running``, ``postmigrate``, ..."""
        return str(self.execute("query-status")["status"])

    def assert_runs_clean(self, passes: int = 2) -> None:
        """The guest goes on here, and finds nothing wrong.

        Two passes: the first may have been begun elsewhere, so only the second has surely seen all
        pages here.
        """
        self.serial.wait_passes(passes)
        assert self.run_state() == "running", self.state()
        assert self.serial.complaints == []

    def pass_descriptor(self, name: str, descriptor: int) -> None:
        """QMP ``getfd``: a descriptor of ours for ``fd:NAME``."""
        # It travels with the command's bytes. With those of an empty line that the monitor skips,
        # the client's own command may follow: QEMU keeps the last descriptor it was sent.
        socket.send_fds(self.qmp._socket, [b" "], [descriptor])
        self.execute("getfd", fdname=name)

    def state(self) -> str:
        return f"{super().state()}\nserial: {self.serial.lines[-5:]}"

    def close(self) -> None:
        super().close()
        self.serial.close()
        shutil.rmtree(self._serial_folder, ignore_errors=True)

    def __enter__(self) -> GuestVM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)


def _backend(backing: str, ram_bytes: int) -> str:
    size = f"id={BLOCK},size={ram_bytes // MIB}M"
    match backing:
        case "anon":
            return f"memory-backend-ram,{size},reserve=off"  # it may be larger than the host
        case "memfd":
            return f"memory-backend-memfd,{size},share=on"
        case "hugetlb":
            return f"memory-backend-memfd,{size},share=on,hugetlb=on,hugetlbsize=2M"
    raise ValueError(backing)


def page_size_of(backing: str) -> int:
    """Host page size of the RAM block, bytes."""
    return 2 * MIB if backing == "hugetlb" else 4096


@functools.cache
def kvm_runs_the_guest(binary: QemuBinary) -> bool:
    """Whether KVM here really executes the guest; that /dev/kvm is there says too little."""
    options = GuestOptions(GuestLayout(32 * MIB, stride=65536), accel="kvm")
    try:
        with GuestVM(binary, options) as vm:
            vm.serial.wait_passes(2, timeout_s=20)
    except (RuntimeError, AssertionError):
        return False
    return True
