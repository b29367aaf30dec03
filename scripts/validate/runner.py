"""Running cases: each in a child process of its own, under a timeout, its end told by its status.

So a hang, a SIGBUS or a kernel that kills the process is a failure of that one case. The child
leads a process group; what it leaves behind is killed with it.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

from scripts.validate import mutants, raw
from scripts.validate.bench import Bench
from scripts.validate.case import Case
from scripts.validate.check import CheckFailed, Skipped, Tally
from scripts.validate.host import Host

PASS, FAIL, SKIP = "pass", "fail", "skip"
STRICT_VARIABLE = "REQUIRE_KERNEL"
# The child ends itself with a traceback first; if it cannot, it is killed.
_GRACE_S = 3.0
_STDERR_KEPT = 3000
_ENDINGS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Result:
    """What came of one case. ``reason`` says why it failed or was skipped."""

    case: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    remedy: str | None = None
    checks: int = 0
    remarks: list[str] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        return {"type": "case", **asdict(self), "seconds": round(self.seconds, 4)}


def is_strict() -> bool:
    return os.environ.get(STRICT_VARIABLE, "") not in ("", "0")


def run(cases: Iterable[Case], host: Host, *, mutant: str | None = None) -> Iterator[Result]:
    """Run them one after the other."""
    for case in cases:
        yield run_case(case, host, mutant=mutant)


def run_case(case: Case, host: Host, *, mutant: str | None = None) -> Result:
    """Run one case, unless something it needs is missing."""
    try:
        for need in case.needs:
            missing = need.missing(host)
            if missing is not None:
                return skipped(case.id, missing.reason, missing.remedy)
        timeout_s = case.timeout_s if mutant is None else mutants.TIMEOUT_S
        return isolated(case.id, lambda: _body(case, host, mutant), timeout_s)
    finally:
        host.end_case()


def skipped(case_id: str, reason: str, remedy: str | None, seconds: float = 0.0) -> Result:
    """A skip; a failure where everything with a remedy was promised (``REQUIRE_KERNEL=1``)."""
    if remedy is not None and is_strict():
        reason = f"{reason} ({STRICT_VARIABLE}=1 on this host)"
        return Result(case_id, FAIL, seconds, reason, remedy)
    return Result(case_id, SKIP, seconds, reason, remedy)


def _body(case: Case, host: Host, mutant: str | None) -> list[str]:
    if mutant is not None:
        mutants.apply(mutant)
    bench = Bench(case.kind, case.variant, host)
    case.body(bench)
    return bench.remarks


def isolated(case_id: str, body: Callable[[], list[str]], timeout_s: float) -> Result:
    """Run ``body`` in a child process; it returns remarks."""
    began = time.monotonic()
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as stderr, _endings_held():
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                _be_child(body, writer, stderr.fileno(), timeout_s)
            finally:  # whatever happens: what the runner cleans up is not the child's to clean up
                os._exit(1)
        os.close(writer)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
            answer = _line(reader, timeout_s + _GRACE_S)
            # Before the kill: a child that answered nothing is asked how it ended.
            status = None if answer or answer is None else _wait(pid)
        finally:
            os.close(reader)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            if not _is_reaped(pid):
                os.kill(pid, signal.SIGKILL)  # it may not lead a group yet
                os.waitpid(pid, 0)
        seconds = time.monotonic() - began
        if answer:
            return _result(case_id, json.loads(answer), seconds)
        return Result(case_id, FAIL, seconds, _epitaph(status, stderr, timeout_s))


@contextlib.contextmanager
def _endings_held() -> Iterator[None]:
    """Nobody ends us between a fork and the child's own rules.

    A signal that the interpreter has noted but not yet handled is copied by fork(2): the child
    would then unwind our clean-up, and give back what is ours. Blocking handles what was noted
    before.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_reaped: set[int] = set()


def _wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    _reaped.add(pid)
    return status


def _is_reaped(pid: int) -> bool:
    found = pid in _reaped
    _reaped.discard(pid)
    return found


def _line(fd: int, timeout_s: float) -> bytes | None:
    """One line; empty when the writer ended without one, ``None`` when the time ran out."""
    data, until = b"", time.monotonic() + timeout_s
    while not data.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        more = os.read(fd, 1 << 16)
        if not more:
            return b""
        data += more
    return data


def _be_child(body: Callable[[], list[str]], writer: int, stderr: int, timeout_s: float) -> None:
    os.setsid()
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
    raw.death_signal(signal.SIGKILL)
    os.dup2(stderr, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    Tally.made = 0
    try:
        remarks = body()
        answer: dict[str, object] = {"status": PASS, "remarks": remarks, "checks": Tally.made}
        if Tally.made == 0:
            answer = {"status": FAIL, "reason": "the case checked nothing"}
    except Skipped as skip:
        answer = {"status": SKIP, "reason": skip.reason, "remedy": skip.remedy}
    except CheckFailed as failure:
        answer = {"status": FAIL, "reason": str(failure), "checks": Tally.made}
    except BaseException:
        answer = {"status": FAIL, "reason": traceback.format_exc(limit=-4).strip()}
    with contextlib.suppress(BrokenPipeError):  # the runner was told to end
        os.write(writer, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _result(case_id: str, answer: dict[str, object], seconds: float) -> Result:
    if answer["status"] == SKIP:
        remedy = answer["remedy"]
        return skipped(case_id, str(answer["reason"]), str(remedy) if remedy else None, seconds)
    remarks, checks = answer.get("remarks"), answer.get("checks")
    return Result(
        case_id,
        str(answer["status"]),
        seconds,
        str(answer.get("reason", "")),
        checks=checks if isinstance(checks, int) else 0,
        remarks=[str(r) for r in remarks] if isinstance(remarks, list) else [],
    )


def _epitaph(status: int | None, stderr: BinaryIO, timeout_s: float) -> str:
    stderr.seek(0)
    tail = stderr.read().decode(errors="replace").strip()[-_STDERR_KEPT:]
    if status is not None and os.WIFSIGNALED(status):
        how = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    elif status is not None and "Timeout" not in tail:
        how = f"exited with {os.WEXITSTATUS(status)} and no answer"
    else:
        how = f"hung: no answer within {timeout_s:g} s"
    return f"{how}\n{tail}" if tail else how
