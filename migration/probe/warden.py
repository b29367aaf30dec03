"""The child that runs the checks, each in a process of its own, and watches over them.

``python -m migration.probe.warden`` reads one request (a line of JSON) from standard input, says on
the first line which rows there will be, and then writes one answer per line. It imports the lower
rooms once and forks per check: a fork costs a millisecond, an interpreter a hundred. It has one
thread and no guest RAM, so forking it is safe.

A check that crashes or hangs loses its own row. One that outlives its time is killed with its
children; one that cannot be killed (asleep in the kernel for good) is left behind. When standard
input ends, because the asker is gone, so does everything here.
"""

from __future__ import annotations

import codecs
import gc
import importlib
import json
import os
import pwd
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from ._native import lib
from .attempt import answer_for, set_effort
from .catalogue import find, nearest
from .facts import describe_host
from .row import Cause, Check, Outcome, Status, untested

_READ_BYTES = 64 << 10
_DETAIL_MAX = 500  # a letter has lines, not pages


@dataclass
class Running:
    """A check under way."""

    check: Check
    pid: int
    pipe: int
    deadline: float
    said: bytearray = field(default_factory=bytearray)


class Warden:
    """Runs checks, at most ``parallel`` at a time, each for at most ``timeout_s``.

    :param hangs_max: when more than these have outlived their time, no check is started any more.
    """

    def __init__(
        self,
        checks: list[Check],
        answer: Callable[[Check, Outcome], None],
        *,
        parallel: int,
        timeout_s: float,
        hangs_max: int,
    ) -> None:
        self._waiting = deque(checks)
        self._answer = answer
        self._parallel = parallel
        self._timeout_s = timeout_s
        self._hangs_left = hangs_max
        self._running: dict[int, Running] = {}  # by pipe
        self._poll = select.poll()

    def run(self, stdin: int) -> None:
        """Until every check has its answer, or the asker is gone."""
        self._poll.register(stdin, select.POLLIN)
        while self._waiting or self._running:
            self._start_what_may()
            for fd, _ in self._poll.poll(self._patience_ms()):
                if fd == stdin:
                    self._abandon()
                    return
                self._listen(self._running[fd])
            for late in [one for one in self._running.values() if time.monotonic() > one.deadline]:
                self._finish(late, is_late=True)

    def _patience_ms(self) -> float:
        deadlines = [one.deadline for one in self._running.values()]
        return max(0.0, min(deadlines, default=0.0) - time.monotonic()) * 1000 + 1

    def _start_what_may(self) -> None:
        if self._hangs_left < 0:
            while self._waiting:
                self._answer(self._waiting.popleft(), _lost("not asked: too many others hung"))
        for check in self._startable():
            self._waiting.remove(check)
            self._start(check)

    def _startable(self) -> Iterator[Check]:
        held = {one.check.lock for one in self._running.values()}
        room = self._parallel - len(self._running)
        for check in list(self._waiting):
            if room <= 0:
                return
            if check.lock is None or check.lock not in held:
                held.add(check.lock)
                room -= 1
                yield check

    def _start(self, check: Check) -> None:
        pipe, child_end = os.pipe()
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(pipe)
            os.close(child_end)
            self._answer(check, _lost(f"fork: {error.strerror}"))
            return
        if pid == 0:
            _be_the_check(check, child_end, parent)
        os.close(child_end)
        self._poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + self._timeout_s * check.weight
        self._running[pipe] = Running(check, pid, pipe, deadline)

    def _listen(self, one: Running) -> None:
        got = os.read(one.pipe, _READ_BYTES)
        one.said += got
        # The end of the pipe, not of the line: by then the process has given its memory back.
        if not got:
            self._finish(one)

    def _finish(self, one: Running, *, is_late: bool = False) -> None:
        self._poll.unregister(one.pipe)
        os.close(one.pipe)
        del self._running[one.pipe]
        status = _reap(one.pid, may_wait=not is_late)
        _kill_group(one.pid)
        if status is None:
            self._hangs_left -= 1
            _reap(one.pid, may_wait=False)
        timeout_s = self._timeout_s * one.check.weight
        self._answer(one.check, _outcome_of(one, status, timeout_s))

    def _abandon(self) -> None:
        for one in self._running.values():
            _kill_group(one.pid)


def _reap(pid: int, *, may_wait: bool) -> int | None:
    done, status = os.waitpid(pid, 0 if may_wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _kill_group(pid: int) -> None:
    """The check and the processes it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _outcome_of(one: Running, status: int | None, timeout_s: float) -> Outcome:
    if one.said.endswith(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            return Outcome.from_json(json.loads(one.said))
    if status is None:
        return _lost(f"no answer within {timeout_s:g} s")
    if status == -signal.SIGSYS:
        return untested(
            Cause.RESTRICTION,
            "a system call filter (seccomp) killed the check",
            "docker run --security-opt seccomp=PROFILE.json, with the call allowed",
        )
    if status < 0:
        return _lost(f"the check was ended by {signal.Signals(-status).name}")
    return _lost(f"the check ended with status {status} and no answer")


def _lost(reason: str) -> Outcome:
    return untested(Cause.LOST, reason)


def _be_the_check(check: Check, out: int, parent: int) -> None:
    """In the forked child: put the question, write the answer, end. Never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        if lib.host_die_with_parent(parent) == 0:
            quiet = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(quiet, standard)
            os.write(out, json.dumps(_ask(check).to_json()).encode() + b"\n")
            status = 0
    finally:
        os._exit(status)


def _ask(check: Check) -> Outcome:
    try:
        outcome = check.run()
    except Exception as error:
        outcome = answer_for(error, check.since)
    shortened = [
        text if text is None else " ".join(text.split())[:_DETAIL_MAX]
        for text in (outcome.detail, outcome.reason, outcome.remedy)
    ]
    cause = None if outcome.status is Status.YES else outcome.cause
    return Outcome(outcome.status, shortened[0] or "", cause, *shortened[1:])


def become(name: str) -> None:
    """Be this user from here on, with its groups and without capabilities.

    :raises KeyError: there is no such user. :raises PermissionError: only root may.
    """
    entry = pwd.getpwnam(name)
    for codec in ("ascii", "idna"):  # loaded when first used, perhaps from where only root may read
        codecs.lookup(codec)
    os.initgroups(name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    # Whoever changes its user gives up its own /proc/self, too: the new user could not read it.
    lib.host_keep_proc()


def select_checks(known: list[Check], words: list[str] | None) -> list[Check]:
    """Those that are meant by ``words`` (all, if ``None``), each once, in the catalogue's order."""
    if words is None:
        return known
    meant = {check.name for word in words for check in find(known, word)}
    return [check for check in known if check.name in meant]


def main() -> int:
    """Answer one request. The exit status is 0 unless the request itself makes no sense."""
    request = json.loads(sys.stdin.buffer.readline())
    module, _, function = request["catalogue"].partition(":")
    known: list[Check] = getattr(importlib.import_module(module), function)()
    words: list[str] | None = request["words"]
    unknown = {word: nearest(known, word) for word in words or () if not find(known, word)}
    chosen = [] if unknown else select_checks(known, words)
    if request["user"] is not None:
        become(request["user"])
    _say(
        {
            "host": describe_host().to_json(),
            "rows": [check.heading() for check in chosen],
            "unknown": unknown,
        }
    )
    # Everything so far stays as it is: a collection in a child would copy all of it.
    gc.freeze()
    gc.disable()
    set_effort(request["timeout_s"], is_thorough=request["thorough"])
    warden = Warden(
        # What may hang goes first: waiting for it then costs the others no time.
        sorted(chosen, key=lambda check: check.group != "kvm"),
        lambda check, outcome: _say({"name": check.name, "outcome": outcome.to_json()}),
        parallel=request["parallel"],
        timeout_s=request["timeout_s"],
        hangs_max=request["hangs_max"],
    )
    warden.run(sys.stdin.fileno())
    return 0


def _say(message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main())
