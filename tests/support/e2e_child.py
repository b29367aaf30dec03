"""A side of a migration in a process of its own, steered by the test: see :mod:`e2e_agent`.

A child may hang for good (that is what some tests are about): every wait here has a limit, and what
is thrown then tells what each of its threads does in the kernel.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from tests.support.process import tied_to_us

TIMEOUT_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


class Refused(Exception):
    """A command raised in the child; the text is ``Type: message``."""


class Process(Protocol):
    """What is asked of the process: a part of :class:`subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


def started(link: socket.socket, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """An interpreter of its own."""
    return subprocess.Popen(
        tied_to_us([sys.executable, "-m", "tests.support.e2e_agent", str(link.fileno())]),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[link.fileno()],
    )


class Child:
    """One agent process. Ended by :meth:`close`, whatever state it is in.

    :param start: starts the process otherwise than by :func:`started`, given its end of the link
        and a file for its output.
    """

    def __init__(
        self, name: str, *, start: Callable[[socket.socket, IO[bytes]], Process] | None = None
    ) -> None:
        self.name = name
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._next = 0
        self._stderr = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        ours, theirs = socket.socketpair()
        self._link = ours
        self.process: Process = (start or started)(theirs, self._stderr)
        theirs.close()
        self._reader = threading.Thread(target=self._read, name=f"child-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """All it wrote to stdout and stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    # -- commands ---------------------------------------------------------------------------------

    def call(self, do: str, *args: Any, **kwargs: Any) -> Any:
        """Run a command and return its value. :raises Refused: it raised."""
        answer = self._wait(self.send(do, *args, **kwargs))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["return"]

    def send(self, do: str, *args: Any, **kwargs: Any) -> int:
        """Start a command without waiting for its end."""
        with self._changed:
            self._next += 1
            number = self._next
        message = {"id": number, "do": do, "args": args, "kwargs": kwargs}
        self._link.sendall(json.dumps(message).encode() + b"\n")
        return number

    def _wait(self, number: int) -> dict[str, Any]:
        with self._changed:
            self._until(lambda: number in self._answers, f"the answer to command {number}")
            return self._answers.pop(number)

    # -- events -----------------------------------------------------------------------------------

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """Until such an event was told, however long ago; its whole data.

        :param data: fields that must be as given.
        """

        def found() -> dict[str, Any] | None:
            for event, fields in self.events:
                if event == name and data.items() <= fields.items():
                    return fields
            return None

        with self._changed:
            self._until(lambda: found() is not None, f"event {name} {data}")
            fields = found()
            assert fields is not None
            return fields

    def wait_status(self, status: str) -> None:
        """Until the migration was in that status, however long ago."""
        self.wait_event("MIGRATION", status=status)

    @property
    def statuses(self) -> list[str]:
        """Statuses in the order they were entered."""
        return [str(data["status"]) for name, data in list(self.events) if name == "MIGRATION"]

    def _until(self, holds: Any, what: str) -> None:
        came = self._changed.wait_for(lambda: holds() or self._ended, TIMEOUT_S)
        if not holds():
            why = f"{self.name} ended" if came else f"no answer within {TIMEOUT_S:g} s"
            raise AssertionError(f"{what} did not come: {why}\n{self.describe()}")

    # -- the end ----------------------------------------------------------------------------------

    def wait_exit(self) -> int:
        """Its exit status, once it ended by itself; negative: the signal."""
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end\n{self.describe()}") from None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        """End it at once; harmless the second time."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(TIMEOUT_S)
        self._link.close()
        self._stderr.close()

    def describe(self) -> str:
        """For a failed wait: events, output, and where each thread is in the kernel."""
        lines = [f"--- {self.name} (pid {self.pid}, exit {self.process.poll()})"]
        lines += [f"event {name} {data}" for name, data in self.events]
        lines += [f"thread {text}" for text in threads_of(self.pid)]
        return "\n".join([*lines, self.stderr])

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._link.makefile("r") as lines:
            for line in lines:
                message = json.loads(line)
                with self._changed:
                    if "event" in message:
                        self.events.append((message["event"], message["data"]))
                    else:
                        self._answers[message["id"]] = message
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def threads_of(pid: int) -> Iterator[str]:
    """Each thread's id, name and place in the kernel, as far as readable. Source: proc(5)."""
    for task in sorted(Path(f"/proc/{pid}").glob("task/*")):
        words = [task.name]
        for name in ("comm", "wchan", "syscall"):
            with contextlib.suppress(OSError):
                words.append((task / name).read_text().strip())
        yield " ".join(words)


@contextlib.contextmanager
def child(name: str = "destination", **options: Any) -> Iterator[Child]:
    """A child with its machine made; ended at the end. What it printed goes with any failure."""
    one = Child(name)
    try:
        if options:
            one.call("make", **options)
        yield one
    except BaseException as error:
        error.add_note(one.describe())
        raise
    finally:
        one.close()
