"""One hop of the guest: a QEMU's migration into one of our verbs, or a verb into a QEMU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.guest_vm import TIMEOUT_S, GuestVM
from tests.support.monitor_process import ROOT, postcopy_argv
from tests.support.process import end, tied_to_us

MODES = ("precopy", "postcopy", "postcopy-later", "preempt")
TRANSPORTS = ("unix", "tcp", "exec", "fd")
MULTI_CHANNEL = ("unix", "tcp")
LAST_STATE_S = 30.0
_SLOW = 2 << 20  # bytes per second of the precopy phase, so that much is left for postcopy
_STDIO = Path(__file__).parent / "guest" / "stdio.py"


class Verb:
    """A verb as a child that says what it does; its text is read as it comes.

    :ivar result: the last JSON object, once it ended.
    """

    def __init__(self, *arguments: str, descriptors: tuple[int, ...] = ()) -> None:
        self.arguments = arguments
        self._argv = postcopy_argv(*arguments, "--json")
        self.process = subprocess.Popen(
            tied_to_us(self._argv),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
        )
        self.text: list[str] = []
        self.objects: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._threads = [
            threading.Thread(target=self._read_text, daemon=True),
            threading.Thread(target=self._read_objects, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read_text(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.text.append(line.decode(errors="replace").rstrip())
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _read_objects(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.objects.append(json.loads(line))

    @property
    def said(self) -> str:
        """All its text."""
        with self._changed:
            return "\n".join(self.text)

    def wait_text(self, part: str, *, timeout_s: float = TIMEOUT_S) -> str:
        """The first line, past or to come, with this in it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or any(part in line for line in self.text), timeout_s
            )
            for line in self.text:
                if part in line:
                    return line
        raise AssertionError(f"{self.arguments} never said {part!r}: {self.said}")

    def wait(self, *, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit status."""
        status = self.process.wait(timeout_s)
        for thread in self._threads:
            thread.join()
        return status

    def succeed(self) -> dict[str, Any]:
        """Wait for a good end; the last object it printed."""
        status = self.wait()
        assert status == 0, f"{self.arguments} ended with {status}: {self.said}"
        return self.objects[-1]

    def fail(self, *parts: str) -> str:
        """Wait for a failure that says these; its text, which never is a traceback."""
        status = self.wait()
        assert status in (1, 2), f"{self.arguments} ended with {status}: {self.said}"
        for part in parts:
            assert part in self.said, f"{part!r} is not in: {self.said}"
        assert "Traceback" not in self.said, self.said
        return self.said

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Verb:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self.process)
        for thread in self._threads:
            thread.join(5)
        if error is not None:
            error.add_note(f"{' '.join(self.arguments)}: {self.said}")


@dataclass(frozen=True, slots=True)
class Way:
    """How two processes find each other.

    :ivar listen: the side that waits says this. :ivar connect: the other one this.
    :ivar descriptor: for ``fd``: what the QEMU gets under the name ``migration``.
    :ivar ours: descriptors our verb inherits.
    """

    listen: str
    connect: str
    descriptor: int = -1
    ours: tuple[int, ...] = ()


@contextmanager
def way(transport: str, *, to_us: bool) -> Iterator[Way]:
    """A way for one migration of this transport; ``to_us``: our verb listens, else QEMU does."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="way-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        path = f"unix:{folder}/m"
        command = f"{sys.executable} {_STDIO}"
        match transport:
            case "unix":
                yield Way(path, path)
            case "tcp":
                # Who listens picks the port and says so; QEMU is asked through its monitor.
                yield Way("tcp:127.0.0.1:0", "")
            case "exec":
                # The command of the connecting side is two-way: its stdio is the unix socket.
                yield Way(path, f"exec:{command} {folder}/m")
            case "fd":
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    number = ours.fileno()
                    if to_us:
                        yield Way(f"fd:{number}", "fd:migration", theirs.fileno(), (number,))
                    else:
                        yield Way("fd:migration", f"fd:{number}", theirs.fileno(), (number,))
            case _:
                raise ValueError(transport)


def send(vm: GuestVM, uri: str, mode: str, *, later_s: float = 1.0) -> None:
    """Start the VM's outgoing migration; with a postcopy mode it has been switched on return."""
    if mode == "precopy":
        vm.set_capabilities("return-path")
        vm.set_parameters(max_bandwidth=1 << 32, downtime_limit=2000)
        vm.execute("migrate", uri=uri)
        return
    capabilities = ["postcopy-ram", "postcopy-preempt"] if mode == "preempt" else ["postcopy-ram"]
    vm.set_capabilities(*capabilities)
    # Whatever a burst makes it believe of its bandwidth, it is not to complete without postcopy.
    vm.set_parameters(max_bandwidth=_SLOW, downtime_limit=1)
    vm.execute("migrate", uri=uri)
    vm.wait_status("active")
    if mode == "postcopy-later":
        # That long in the precopy phase: nothing happens that could be waited for.
        threading.Event().wait(later_s)
    vm.execute("migrate-start-postcopy")


def finish_sending(vm: GuestVM) -> None:
    """The source's own word: it believes in the end, and keeps no running guest."""
    vm.wait_status("completed")
    # QEMU says completed first.
    until = time.monotonic() + LAST_STATE_S
    while vm.run_state() != "postmigrate":
        assert time.monotonic() < until, vm.state()
        time.sleep(0.01)


def start_verb(
    verb: str, way_: Way, *arguments: str, descriptors: tuple[int, ...] = ()
) -> tuple[Verb, str]:
    """A verb that listens at its end of the way, ready; and what QEMU connects to."""
    words = (verb, "--listen", way_.listen, *arguments)
    child = Verb(*words, descriptors=(*way_.ours, *descriptors))
    try:
        said = child.wait_text("listening on")
    except BaseException:
        child.__exit__(None, None, None)
        raise
    return child, way_.connect or said.rpartition(" ")[2]


def park(
    vm: GuestVM, directory: Path, mode: str, transport: str, *arguments: str
) -> dict[str, Any]:
    """QEMU into a parked VM; what the verb reported."""
    with way(transport, to_us=True) as way_:
        child, uri = start_verb("park", way_, *arguments, str(directory))
        with child:
            if way_.descriptor >= 0:
                vm.pass_descriptor("migration", way_.descriptor)
            send(vm, uri, mode)
            result = child.succeed()
            finish_sending(vm)
    return result


def listen(vm: GuestVM, way_: Way, *, preempt: bool = False) -> str:
    """QEMU waits for a postcopy; where."""
    vm.set_capabilities("postcopy-ram", *(["postcopy-preempt"] if preempt else []))
    if way_.descriptor >= 0:
        vm.pass_descriptor("migration", way_.descriptor)
    vm.execute("migrate-incoming", uri=way_.listen)
    if way_.connect:
        return way_.connect
    address = vm.query_migrate()["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


def unpark(
    directory: Path, vm: GuestVM, transport: str, *arguments: str, preempt: bool = False
) -> dict[str, Any]:
    """A parked VM into a QEMU; what the verb reported."""
    with way(transport, to_us=False) as way_:
        uri = listen(vm, way_, preempt=preempt)
        words = [*arguments, *(preempt_words(vm) if preempt else [])]
        with Verb("unpark", str(directory), uri, *words, descriptors=way_.ours) as child:
            result = child.succeed()
        vm.wait_status("completed")
    return result


def preempt_words(vm: GuestVM) -> list[str]:
    """How a verb is told that this QEMU has the capability."""
    return ["--preempt", "7.2" if vm.binary.version < (8, 0) else "8.0"]


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest as anybody would read it."""
    data: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return data


def block_file(directory: Path, idstr: str) -> Path:
    """The file of one RAM block."""
    for block in manifest_of(directory)["blocks"]:
        if block["idstr"] == idstr:
            return directory / str(block["file"])
    raise KeyError(idstr)


def same_memory(vm: GuestVM, file: Path, *, limit: int = 64 << 20) -> None:
    """The VM (stopped) holds in low memory what the file does, up to ``limit`` bytes."""
    length = min(limit, vm.options.layout.last)
    with open(file, "rb") as parked:
        for at in range(1 << 20, length, 16 << 20):  # below 1 MiB other blocks show
            size = min(16 << 20, length - at)
            parked.seek(at)
            assert parked.read(size) == vm.read_ram(at, size), f"differs in [{at:#x}, +{size:#x})"


def nothing_left(directory: Path) -> None:
    """Neither the directory nor a part of one."""
    assert not directory.exists()
    assert os.listdir(directory.parent) == []
