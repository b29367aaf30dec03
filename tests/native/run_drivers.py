"""Builds and runs the C drivers of this folder under the sanitizers: no interpreter, no preloading.

A driver is ``NAME_driver.c`` here. Its first comment names what it is linked with, from the
repository's root::

    /* sources: uffd/csrc/uffd.c guestmem/csrc/b*.c */

and may narrow where headers are looked for by an ``includes:`` comment of folders. It ends with
0 passed, 1 failed, 77 skipped; the last line it prints then says why, with ``remedy: COMMAND`` in
it where there is one. Run as a program this does all drivers, or the named ones::

    python -m tests.native.run_drivers [NAME...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "sanitize"

SKIPPED = 77
TIMEOUT_S = 300.0

FLAGS = (
    "-std=gnu11",
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
)
SANITIZERS: Mapping[str, tuple[str, ...]] = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
# Any report ends the driver with this code, which is none of its own.
_REPORT_CODE = 66
_OPTIONS = {
    "ASAN_OPTIONS": f"detect_leaks=1:exitcode={_REPORT_CODE}",
    "LSAN_OPTIONS": f"exitcode={_REPORT_CODE}",
    "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={_REPORT_CODE}",
    "TSAN_OPTIONS": f"halt_on_error=1:second_deadlock_stack=1:exitcode={_REPORT_CODE}",
}
_LISTS = r"/\*\s*%s:(.*?)\*/"
_HEAD_BYTES = 4 << 10  # the comments stand at the beginning


class BuildError(Exception):
    """The compiler refused; its words are the message."""


@dataclass(frozen=True)
class Outcome:
    """What one driver did under one sanitizer."""

    code: int
    output: str
    seconds: float

    @property
    def verdict(self) -> str:
        """``passed``, ``skipped`` or ``FAILED``."""
        return {0: "passed", SKIPPED: "skipped"}.get(self.code, "FAILED")

    @property
    def last_line(self) -> str:
        """The reason of a skip."""
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else ""


def drivers(folder: Path = DRIVERS) -> list[Path]:
    """All drivers there are."""
    return sorted(folder.glob("*_driver.c"))


def compiler() -> str | None:
    """``$CC``, else the system's."""
    return (
        os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    )


def listed(driver: Path, what: str) -> list[Path] | None:
    """What the driver's comment of that name lists; ``None`` without such a comment."""
    head = driver.read_text()[:_HEAD_BYTES]
    match = re.search(_LISTS % what, head, re.DOTALL)
    if match is None:
        return None
    # A pattern stands for all files of a room; a name that matches none is the compiler's to
    # report.
    return [
        path for name in match.group(1).split() for path in sorted(ROOT.glob(name)) or [ROOT / name]
    ]


def include_folders(driver: Path) -> list[Path]:
    """Every room's C folder, for headers are named without a path; or those the driver names."""
    rooms = (
        path for top in ("uffd", "guestmem", "migration") for path in (ROOT / top).rglob("csrc")
    )
    return listed(driver, "includes") or sorted(rooms)


def sources(driver: Path) -> list[Path]:
    """The driver and what its first comment names."""
    names = listed(driver, "sources")
    if names is None:
        raise BuildError(f"{driver.name}: no '/* sources: ... */' at the beginning")
    return [driver, *names]


def build(driver: Path, sanitizer: str, *, into: Path = BUILD) -> Path:
    """Compile one driver, unless an earlier result is newer than everything it could be made of.

    :raises BuildError: warnings count as errors; or there is no compiler.
    """
    cc = compiler()
    if cc is None:
        raise BuildError("no C compiler; remedy: apt-get install gcc libc6-dev")
    parts, folders = sources(driver), include_folders(driver)
    binary = into / f"{driver.stem}-{sanitizer}"
    headers = [header for folder in folders for header in folder.glob("*.h")]
    newest = max(path.stat().st_mtime for path in (*parts, *headers) if path.exists())
    if binary.exists() and binary.stat().st_mtime > newest:
        return binary
    into.mkdir(parents=True, exist_ok=True)
    argv = [cc, *FLAGS, *SANITIZERS[sanitizer], *(f"-I{folder}" for folder in folders)]
    argv += [f"-I{DRIVERS}", *map(str, parts), "-o", str(binary)]
    answer = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    if answer.returncode != 0:
        raise BuildError(f"{driver.name} ({sanitizer}): {answer.stderr}")
    return binary


def run(driver: Path, sanitizer: str, *, into: Path = BUILD) -> Outcome:
    """Build and run one driver. A build error and a hang are failures like any other."""
    start = time.monotonic()
    try:
        binary = build(driver, sanitizer, into=into)
        answer = subprocess.run(
            [*_fixed_layout(sanitizer), str(binary)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **_OPTIONS},
            timeout=TIMEOUT_S,
            check=False,
            cwd=ROOT,
        )
    except BuildError as error:
        return Outcome(1, str(error), time.monotonic() - start)
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
        return Outcome(1, f"{text}\nno end after {TIMEOUT_S:g} s", time.monotonic() - start)
    output = answer.stdout.decode(errors="replace")
    return Outcome(answer.returncode, output, time.monotonic() - start)


def _fixed_layout(sanitizer: str) -> Sequence[str]:
    """Thread sanitizers before gcc 14 give up where the kernel randomises mappings too widely."""
    setarch = shutil.which("setarch")
    return [setarch, "-R"] if sanitizer == "thread" and setarch else []


def main(names: Sequence[str]) -> int:
    """Run drivers and print one line each, with the output of those that failed."""
    chosen = [path for path in drivers() if not names or path.stem.removesuffix("_driver") in names]
    if not chosen:
        print(f"no such driver; there are: {[path.stem for path in drivers()]}", file=sys.stderr)
        return 1
    counts = {"passed": 0, "FAILED": 0, "skipped": 0}
    for driver in chosen:
        for sanitizer in SANITIZERS:
            outcome = run(driver, sanitizer)
            counts[outcome.verdict] += 1
            note = outcome.last_line if outcome.verdict == "skipped" else ""
            print(
                f"{outcome.verdict:8}{driver.stem:28}{sanitizer:9}{outcome.seconds:6.1f} s  {note}"
            )
            if outcome.verdict == "FAILED":
                print(outcome.output, f"exit code {outcome.code}", sep="\n")
            sys.stdout.flush()
    print(f"{counts['passed']} passed, {counts['FAILED']} failed, {counts['skipped']} skipped")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
