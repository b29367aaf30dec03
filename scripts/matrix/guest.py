"""Runs inside the VM: probe, validation, demo, tests, migrations; each answer goes out by a serial
port of its own.

Serial ports because they need no driver, no network and no disk, and because what was written is on
the host even when this kernel dies in the next moment. ttyS0 is the console.
"""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from scripts.matrix import migrations

CASES, JUNIT, STEPS = "/dev/ttyS1", "/dev/ttyS2", "/dev/ttyS3"
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_TAIL = 4000
_STEP_S = 1200.0
# Of one check, before patience; a host needs a few milliseconds, an emulated one that shares its
# processor with others has needed four seconds.
_PROBE_S = 5.0
# A test that hangs must be told by pytest before the silence ends the VM. Wide lines: its summary
# leaves out why a test failed where the line would be longer than the terminal.
_PYTEST = (
    *(sys.executable, "-m", "pytest", "-v", "-rfEs", "--no-header", "--timeout=150"),
    *("-p", "no:cacheprovider"),
)
_WIDE = {"COLUMNS": "500"}


def main(arguments: Sequence[str]) -> int:
    plan = json.loads(Path(arguments[0]).read_text())
    steps = _port(STEPS)
    _network_up(plan.get("address"))
    _say(steps, {"step": "boot", "kernel": platform.release(), "uptime_s": _uptime_s()})
    # The probe looks at what is there; the cases take their own, to give back.
    with _hugepages(plan["hugepages"]):
        limit = str(_PROBE_S * plan["patience"])
        line = [sys.executable, "-m", "migration", "probe", "--json", "--timeout", limit]
        if plan.get("moves"):  # the other VM waits
            line += [f"--feature={row}" for row in migrations.NEEDS.values()]
        probed = _run("probe", line)
    _say(steps, probed)
    rows = _rows(str(probed["out"]))
    if plan["validate"]:
        began = time.monotonic()
        count = validate(plan["only"], plan["patience"], plan["hugepages"])
        seconds = round(time.monotonic() - began, 1)
        _say(steps, {"step": "validate", "cases": count, "seconds": seconds})
    with _hugepages(plan["hugepages"]):
        for backing in plan["demos"]:
            _say(steps, _shown(migrations.demo(backing, rows)))
        if plan["tests"]:
            _say(steps, _run("tests", [*_PYTEST, *plan["tests"]], aloud=True))
        if plan.get("moves"):
            for record in migrations.crossings(plan, rows):
                _say(steps, _shown(record))
    _say(steps, {"step": "end"})
    return 0


def _rows(probed: str) -> dict[str, dict[str, object]]:
    """The probe's rows by name."""
    found = [json.loads(line) for line in probed.splitlines() if line.startswith("{")]
    return {str(row["row"]): row for row in found if row.get("record") == "row"}


def _shown(record: dict[str, object]) -> dict[str, object]:
    """On the console as well."""
    words = [str(record.get(name, "")) for name in ("step", "backing", "status", "reason")]
    print("# " + " ".join(words), flush=True)
    return record


def validate(only: Sequence[str], patience: float, hugepages: int) -> int:
    """The cases of ``scripts/validate-kernel``, with ``patience`` times its time limits: an
    emulated processor is slow, which is no fault of the kernel. Returns how many ran.
    """
    from scripts.validate import report, runner
    from scripts.validate.case import select
    from scripts.validate.host import Host

    cases = [dataclasses.replace(c, timeout_s=c.timeout_s * patience) for c in select(only)]
    _be_patient(patience)
    host, results = Host(hugepages=hugepages), []
    try:
        lines = report.JsonLines(_port(CASES), host)
        tap = report.Tap(sys.stdout, len(cases))
        for result in runner.run(cases, host):
            results.append(result)
            lines.add(result)
            tap.add(result)
        tap.end(results)
        file = Path("/tmp/junit.xml")
        report.write_junit(file, results, host)
        port = _port(JUNIT)
        port.write(file.read_text() + "\n")
        port.flush()
    finally:
        host.close()
    return len(results)


@contextlib.contextmanager
def _hugepages(count: int) -> Iterator[None]:
    """So many in the pool; nobody else is in this machine."""
    if not _POOL.exists():
        yield
        return
    _POOL.write_text(str(count))
    try:
        yield
    finally:
        _POOL.write_text("0")


def _be_patient(factor: float) -> None:
    """How long a case waits for what must come; a name of several modules of the cases."""
    for name, module in list(sys.modules.items()):
        if name.startswith("scripts.validate.") and hasattr(module, "PATIENCE_S"):
            vars(module)["PATIENCE_S"] *= factor


def _run(step: str, command: Sequence[str], *, aloud: bool = False) -> dict[str, object]:
    """:param aloud: on the console as well, line by line: a hang shows where, and long is not
    silent.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | _WIDE
        )
        late = threading.Timer(_STEP_S, child.kill)
        late.start()
        lines = []
        with child:
            for line in child.stdout or ():
                lines.append(line)
                if aloud:
                    print(line, end="", flush=True)
        late.cancel()
        errors.seek(0)
        err = errors.read()[-_TAIL:]
    print(f"# {step}: exit status {child.returncode}\n{err}", flush=True)
    seconds, out = round(time.monotonic() - began, 1), "".join(lines)
    return {"step": step, "status": child.returncode, "seconds": seconds, "out": out, "err": err}


def _say(port: TextIO, record: dict[str, object]) -> None:
    print(json.dumps(record), file=port, flush=True)
    termios.tcdrain(port.fileno())


def _port(path: str) -> TextIO:
    """A serial port that changes nothing of what passes."""
    fd = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    tty.setraw(fd)
    return open(fd, "w")


def _uptime_s() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def _network_up(address: str | None) -> None:
    """The loopback; and, of two connected VMs, the one card there is."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if address is not None:
        subprocess.run(["ip", "address", "add", f"{address}/24", "dev", "eth0"], check=True)
        subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
