"""Who acts in a case besides its main thread: sleepers, a serving thread, a process of its own."""

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

from scripts.validate import raw
from scripts.validate.check import CheckFailed, Skipped, Tally, expect
from uffd import PageFault, Userfaultfd, touch
from uffd.events import Event

PATIENCE_S = 10.0


class Sleeper:
    """A thread that does one thing without the interpreter lock, and what came of it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._result: object = None
        self._error: BaseException | None = None
        self._action = action
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._action()
        except BaseException as error:
            self._error = error

    def join(self, what: str = "the thread") -> object:
        """What the action returned. :raises: what it raised; CheckFailed when it still sleeps."""
        self.thread.join(PATIENCE_S)
        expect(not self.thread.is_alive(), f"{what} goes on")
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def is_asleep(self) -> bool:
        """Still at it. Only meaningful where the kernel would have let it go by now."""
        return self.thread.is_alive()


def loading(address: int) -> Sleeper:
    return Sleeper(lambda: touch.load(address))


def storing(address: int, value: int) -> Sleeper:
    return Sleeper(lambda: touch.store(address, value))


def next_event(uffd: Userfaultfd, timeout_s: float = PATIENCE_S) -> Event:
    """The next message. :raises CheckFailed: none comes."""
    until = time.monotonic() + timeout_s
    while uffd.wait(max(0.0, until - time.monotonic())):
        for event in uffd.read_events(1):  # one: the others are for the next call
            return event
    raise CheckFailed("no message came")


def next_events(uffd: Userfaultfd, count: int) -> list[Event]:
    """Exactly ``count`` messages, in the order they were read."""
    found: list[Event] = []
    while len(found) < count:
        if not uffd.wait(PATIENCE_S):
            raise CheckFailed(f"{len(found)} messages came, not {count}: {found}")
        found += uffd.read_events(count - len(found))
    return found


def next_fault(uffd: Userfaultfd) -> PageFault:
    event = next_event(uffd)
    if not isinstance(event, PageFault):
        raise CheckFailed(f"{event} came, not a page fault")
    return event


class Server:
    """A thread that answers the messages of contexts until told to stop.

    ``answer(uffd, event)`` runs on it. What it raises is raised by :meth:`stop`. The thread needs
    the interpreter lock: whoever touches the memory must not hold it.
    """

    def __init__(self, uffd: Userfaultfd, answer: Callable[[Userfaultfd, Event], None]) -> None:
        self.events: list[Event] = []
        self._answer = answer
        self._contexts = {uffd.fileno(): uffd}
        self._stop = os.eventfd(0)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, uffd: Userfaultfd) -> None:
        """Serve this one too; from ``answer`` only (a fork's child)."""
        self._contexts[uffd.fileno()] = uffd

    def faults(self) -> list[PageFault]:
        return [e for e in self.events if isinstance(e, PageFault)]

    def _run(self) -> None:
        try:
            while True:
                poller = select.poll()
                for fd in (self._stop, *self._contexts):
                    poller.register(fd, select.POLLIN)
                ready = [fd for fd, _ in poller.poll()]
                if self._stop in ready:
                    return
                for fd in ready:
                    for event in self._contexts[fd].read_events():
                        self.events.append(event)
                        self._answer(self._contexts[fd], event)
        except BaseException as error:
            self._failure = error
            # Whoever sleeps on a page goes on (with zeros), and the case learns why in stop().
            for uffd in self._contexts.values():
                uffd.close()

    def stop(self) -> None:
        """Stop and wait. :raises: what ``answer`` raised."""
        os.eventfd_write(self._stop, 1)
        self._thread.join(PATIENCE_S)
        expect(not self._thread.is_alive(), "the serving thread ends")
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # What failed while serving is the cause of what the case then saw.
        if error is None or self._failure is not None:
            self.stop()


class Channel:
    """Both ends of the talk between a case and its subject: JSON values, and userfaultfds."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.settimeout(PATIENCE_S)

    def say(self, value: object, fds: Iterable[int] = ()) -> None:
        socket.send_fds(self._end, [json.dumps(value).encode()], list(fds))

    def hear(self) -> object:
        value, fds = self.hear_with_fds()
        for fd in fds:
            os.close(fd)
        return value

    def hear_with_fds(self) -> tuple[object, list[int]]:
        """:raises CheckFailed: the other end is gone, silent, or reports a failure."""
        try:
            data, fds, _, _ = socket.recv_fds(self._end, 1 << 16, 4)
        except TimeoutError:
            raise CheckFailed("the other process says nothing") from None
        if not data:
            raise CheckFailed("the other process ended")
        value = json.loads(data)
        if isinstance(value, dict):
            _raise_reported(value, "the other process")
        return value, list(fds)


def _raise_reported(answer: dict[str, object], where: str) -> None:
    """Raise here what another process of the case reported instead of a result."""
    if "failed" in answer:
        raise CheckFailed(f"in {where}: {answer['failed']}")
    if "skipped" in answer:
        remedy = answer["remedy"]
        raise Skipped(str(answer["skipped"]), None if remedy is None else str(remedy))


class Subject:
    """A process forked before the case makes threads; it runs ``body(channel)`` and ends.

    Its memory is its own, so its userfaultfd can be served by the case as a monitor would.
    """

    def __init__(self, body: Callable[[Channel], object]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _be_subject(body, Channel(theirs))
        theirs.close()
        self.channel = Channel(ours)

    def uffd(self) -> Userfaultfd:
        """The context the subject sent with ``channel.say("uffd", [fd])``."""
        value, fds = self.channel.hear_with_fds()
        expect(value == "uffd" and len(fds) == 1, "the subject sends its userfaultfd")
        return Userfaultfd.from_fd(fds[0])

    def result(self) -> object:
        """What the body returned. :raises CheckFailed: what failed there, or how it died."""
        try:
            value = self.channel.hear()
        except CheckFailed as error:
            raise CheckFailed(f"{error}; {self.ending()}") from None
        assert isinstance(value, dict)
        Tally.made += int(value["checks"])
        self.ending()
        return value["returned"]

    def ending(self) -> str:
        """How the process ended; it is killed if it does not."""
        with contextlib.suppress(ChildProcessError):
            pidfd = os.pidfd_open(self.pid)
            if not select.select([pidfd], [], [], 1.0)[0]:
                os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            os.close(pidfd)
            if os.WIFSIGNALED(status):
                return f"it died of {signal.Signals(os.WTERMSIG(status)).name}"
            return f"it exited with {os.WEXITSTATUS(status)}"
        return "it is gone"


def _be_subject(body: Callable[[Channel], object], channel: Channel) -> None:
    raw.death_signal(signal.SIGKILL)
    before = Tally.made
    try:
        returned = body(channel)
        channel.say({"returned": returned, "checks": Tally.made - before})
    except CheckFailed as error:
        channel.say({"failed": str(error)})
    except Skipped as skip:
        channel.say({"skipped": skip.reason, "remedy": skip.remedy})
    except BaseException:
        channel.say({"failed": traceback.format_exc(limit=-3)})
    finally:
        os._exit(0)


def in_child(body: Callable[[], object], what: str = "the fork child") -> object:
    """Fork without any event reader, run ``body`` in the child, and hear its result here."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_child(body, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], PATIENCE_S)
        data = pipe.read() if ready else b""
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    expect(bool(data), f"{what} answers (status {status:#x})")
    answer = json.loads(data)
    _raise_reported(answer, what)
    Tally.made += answer["checks"]
    return answer["returned"]


def _be_child(body: Callable[[], object], writer: int) -> None:
    before = Tally.made
    try:
        answer: dict[str, object] = {"returned": body()}
        answer["checks"] = Tally.made - before
    except CheckFailed as error:
        answer = {"failed": str(error)}
    except Skipped as skip:
        answer = {"skipped": skip.reason, "remedy": skip.remedy}
    except BaseException as error:
        answer = {"failed": f"{type(error).__name__}: {error}"}
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)


@contextlib.contextmanager
def running(uffd: Userfaultfd, answer: Callable[[Userfaultfd, Event], None]) -> Iterator[Server]:
    """A :class:`Server` for the length of a block."""
    with Server(uffd, answer) as server:
        yield server
