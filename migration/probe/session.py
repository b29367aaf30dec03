"""One probe: the child that runs the checks, and what came back from it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .facts import Host
from .row import Cause, Outcome, Row, untested

CATALOGUE = "migration.probe.catalogue:all_checks"
TIMEOUT_S = 2.0
_PATIENCE_S = 60.0  # with the child as a whole: only a host that stands still needs it
_READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take.

    :ivar timeout_s: one check; then it is killed and its row lost.
    :ivar parallel: checks at a time. Most of a check's time is spent asleep.
    :ivar is_thorough: also try what takes seconds: to fill pages of 1 GiB.
    """

    timeout_s: float = TIMEOUT_S
    parallel: int = 8
    is_thorough: bool = False

    @property
    def hangs_max(self) -> int:
        """So many checks may hang; when one more does, no further check is started.

        Not a limit of time: on a busy host everything takes long, and is no less true.
        """
        return 2 * self.parallel


class ProbeError(Exception):
    """The child that should ask the questions could not, and not a single row is known."""


class UnknownRow(Exception):
    """No row has such a name.

    :ivar word: what was asked for. :ivar nearest: names that look like it.
    """

    def __init__(self, word: str, nearest: Sequence[str]) -> None:
        super().__init__(f"there is no row {word!r}")
        self.word = word
        self.nearest = tuple(nearest)


@dataclass(frozen=True, slots=True)
class Findings:
    """Rows in the catalogue's order, and the host and user they are about."""

    host: Host
    rows: tuple[Row, ...]


def run_checks(
    words: Sequence[str] | None = None,
    *,
    user: str | None = None,
    catalogue: str = CATALOGUE,
    limits: Limits | None = None,
) -> Findings:
    """Run checks in a child process, a process each.

    Never raises for what a check does: it loses its own row. Any thread may call it, and a process
    with guest RAM too: the child is a new program, not a fork of this one.

    :param words: names of rows, aliases or patterns; ``None`` is all there are.
    :param user: ask as this user, with its groups and without capabilities; takes root. Limits
        (``RLIMIT_*``) stay those of the caller.
    :param catalogue: ``module:function`` that makes the checks, in the child.
    :raises UnknownRow: one of ``words`` means nothing; no check was run.
    :raises ProbeError: the child did not start, or died before it knew its rows.
    """
    chosen = limits or Limits()
    request = {
        "catalogue": catalogue,
        "words": None if words is None else list(words),
        "user": user,
        "timeout_s": chosen.timeout_s,
        "parallel": chosen.parallel,
        "hangs_max": chosen.hangs_max,
        "thorough": chosen.is_thorough,
    }
    text, ending = _converse(json.dumps(request), _PATIENCE_S + 40 * chosen.timeout_s)
    messages = list(_messages(text))
    if not messages or "rows" not in messages[0]:
        raise ProbeError(ending)
    for word, nearest in messages[0]["unknown"].items():
        raise UnknownRow(word, nearest)
    answers = {one["name"]: Outcome.from_json(one["outcome"]) for one in messages[1:]}
    lost = untested(Cause.LOST, ending)
    rows = [Row.of(head, answers.get(head["name"], lost)) for head in messages[0]["rows"]]
    return Findings(Host.from_json(messages[0]["host"]), tuple(rows))


def _messages(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with suppress(ValueError):  # a line cut off by the child's end
            yield json.loads(line)


def _converse(request: str, patience_s: float) -> tuple[str, str]:
    """What the child wrote until it ended, and how it ended."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "migration.probe.warden"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
    except OSError as error:
        raise ProbeError(f"the interpreter cannot be started: {error}") from error
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    with child.stdin, child.stdout, child.stderr:
        # Its input is kept open: the end of it is how the child learns that we are gone.
        with suppress(BrokenPipeError):
            child.stdin.write(request.encode() + b"\n")
            child.stdin.flush()
        out, errors = _read_all(
            child.stdout.fileno(), child.stderr.fileno(), time.monotonic() + patience_s
        )
    return out.decode(errors="replace"), _ending(child, errors)


def _read_all(out: int, errors: int, deadline: float) -> tuple[bytes, bytes]:
    """Both streams to their ends, or until the time is up."""
    found = {out: bytearray(), errors: bytearray()}
    poll = select.poll()
    for fd in found:
        poll.register(fd, select.POLLIN)
    still = set(found)
    while still:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        for fd, _ in poll.poll(left_s * 1000):
            got = os.read(fd, _READ_BYTES)
            found[fd] += got
            if not got:
                poll.unregister(fd)
                still.discard(fd)
    return bytes(found[out]), bytes(found[errors])


def _ending(child: subprocess.Popen[bytes], errors: bytes) -> str:
    try:
        status = child.wait(1.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return "the probe's child did not end"
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    return f"the probe's child {how}" + (f": {last}" if last else "")


def _environment() -> dict[str, str]:
    """The child finds this very package, wherever it was started from."""
    ours = str(Path(__file__).resolve().parents[2])
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": ours if not others else f"{ours}{os.pathsep}{others}"}
