"""One VM from power-on to power-off, under a time limit; its serial ports are files."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONSOLE, CASES, JUNIT, STEPS = "console.log", "cases.jsonl", "junit.xml", "steps.jsonl"
#: In the order of the guest's ports.
PORTS = (CONSOLE, CASES, JUNIT, STEPS)
_DISK_BYTES = 256 << 20
_LINES = 25


@dataclass(frozen=True)
class Limits:
    """``silence_s``: longest time without a byte on any port; ``total_s``: of the whole run."""

    silence_s: float = 300.0
    total_s: float = 2400.0


@dataclass(frozen=True)
class Boot:
    """How a run ended: ``problem`` is empty when the guest came to its plan's end."""

    seconds: float
    problem: str = ""


@dataclass(frozen=True)
class Link:
    """A network card wired to one other VM's by a socket file; no network of the host is touched.

    ``listens``: one of the two; it must be started first.
    """

    socket: Path
    listens: bool
    mac: str

    @property
    def arguments(self) -> list[str]:
        server = "on" if self.listens else "off"
        where = f"server={server},addr.type=unix,addr.path={self.socket}"
        card = f"virtio-net-pci,netdev=link,mac={self.mac},romfile="
        return ["-netdev", f"stream,id=link,{where}", "-device", card]


def command(
    vmlinuz: Path,
    initramfs: Path,
    disk: Path,
    folder: Path,
    memory_mib: int,
    cpus: int,
    link: Link | None = None,
    nodes: int = 1,
) -> list[str]:
    """Emulated, never KVM: where KVM is itself nested it often cannot boot a Linux. ``cx16`` is off
    as QEMU 7.2 emulates that instruction wrongly for newer kernels.
    """
    # It dies with the thread that started it, however that ends.
    line = ["setpriv", "--pdeathsig", "KILL"]
    line += ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,-cx16", "-m", str(memory_mib)]
    line += _numa(nodes, memory_mib, cpus) if nodes > 1 else []
    line += ["-smp", str(cpus), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    for port in PORTS:
        line += ["-serial", f"file:{folder / port}"]
    line += ["-drive", f"file={disk},format=raw,if=none,id=disk,cache=unsafe"]
    line += ["-device", "virtio-blk-pci,drive=disk"]
    line += link.arguments if link else []
    line += ["-kernel", str(vmlinuz), "-initrd", str(initramfs)]
    # A kernel that panics, or whose init ends, reboots at once: QEMU then ends.
    # On a busy host the emulated timer may be late for the check that it ticks at all.
    return [*line, "-append", "console=ttyS0 quiet panic=-1 no_timer_check"]


def _numa(nodes: int, memory_mib: int, cpus: int) -> list[str]:
    """Memory in equal parts; processors dealt out in turn, so a node may have none."""
    line: list[str] = []
    for node in range(nodes):
        size = f"size={memory_mib // nodes}M"
        line += ["-object", f"memory-backend-ram,id=node{node},{size}"]
        own = "".join(f",cpus={cpu}" for cpu in range(node, cpus, nodes))
        line += ["-numa", f"node,nodeid={node},memdev=node{node}{own}"]
    return line


def run(line: Sequence[str], folder: Path, limits: Limits) -> Boot:
    """Run it to its end, or until a limit is passed; a VM never outlives this call."""
    began = time.monotonic()
    with open(folder / "qemu.log", "wb") as log:
        vm = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        problem = _watch(vm, folder, limits)
    finally:
        with contextlib.suppress(ProcessLookupError):
            vm.kill()
        vm.wait()
    seconds = time.monotonic() - began
    if not problem and not is_complete(folder / STEPS):
        problem = f"the VM ended before its plan did (exit status {vm.returncode})"
    if problem:
        problem += f"; {_place(folder)}\n{tail(folder)}"
    return Boot(seconds, problem)


def wait_for(socket: Path, timeout_s: float) -> None:
    """Until another VM listens there. :raises OSError: it does not."""
    deadline = time.monotonic() + timeout_s
    while not socket.exists():
        if time.monotonic() > deadline:
            raise OSError(f"the other VM did not start: no {socket.name} after {timeout_s:g} s")
        time.sleep(0.1)


def _watch(vm: "subprocess.Popen[bytes]", folder: Path, limits: Limits) -> str:
    began = heard = time.monotonic()
    size = -1
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            vm.wait(timeout=1.0)
            return ""
        now, written = time.monotonic(), _written(folder)
        if written != size:
            size, heard = written, now
        if now - began > limits.total_s:
            return f"not done within {limits.total_s:g} s"
        if now - heard > limits.silence_s:
            return f"hung: nothing heard for {limits.silence_s:g} s"


def _written(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in PORTS if (folder / name).exists())


def _place(folder: Path) -> str:
    """The last case that ended, to know where it was."""
    cases = [r for r in records(folder / CASES) if r.get("type") == "case"]
    return f"{len(cases)} cases done, the last {cases[-1]['case']}" if cases else "no case done"


def records(path: Path) -> list[dict[str, object]]:
    """The whole lines of a JSON lines file; what a dying guest wrote half is left out."""
    found: list[dict[str, object]] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
    return found


def is_complete(steps: Path) -> bool:
    return any(record.get("step") == "end" for record in records(steps))


def tail(folder: Path) -> str:
    """The console's last lines, and QEMU's own word."""
    lines: list[str] = []
    for name in ("qemu.log", CONSOLE):
        if (folder / name).exists():
            text = (folder / name).read_text(errors="replace")
            lines += [f"  {name}: {line.rstrip()}" for line in text.splitlines()[-_LINES:]]
    return "\n".join(lines)


def make_disk(folder: Path) -> Path:
    """An empty (sparse) disk; the guest formats it."""
    path = folder / "disk"
    with open(path, "wb") as file:
        os.truncate(file.fileno(), _DISK_BYTES)
    return path
