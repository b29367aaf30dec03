"""What a verb itself took of memory, for its report."""

from __future__ import annotations

from pathlib import Path


def memory_peak_bytes() -> int | None:
    """The largest resident set of this process so far, pages of mapped files included; None where
    the kernel does not tell (proc_pid_status(5), VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return None
