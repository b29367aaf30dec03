"""Small facts of this host and this user, from /proc and /sys; each costs microseconds."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Capabilities that matter here, by number (``capabilities(7)``).
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}

_FIRST_NAMESPACES = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}
_CONTAINER_MARKERS = {
    "/.dockerenv": "docker",
    "/run/.containerenv": "podman",
    "/var/run/secrets/kubernetes.io": "kubernetes",
}
SYSCTL_UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")


def text_of(path: str | Path) -> str:
    """The stripped content of a small file; empty when it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def chosen(setting: str) -> str:
    """``always [madvise] never`` is ``madvise``; anything else is returned as it is."""
    match = re.search(r"\[([^]]+)\]", setting)
    return match[1] if match else setting


def own_status(field: str) -> str:
    """A field of /proc/self/status; empty when this kernel does not show it."""
    for line in text_of("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


def capabilities() -> frozenset[str]:
    """Those of :data:`CAPABILITIES` that are in effect."""
    bits = int(own_status("CapEff") or "0", 16)
    return frozenset(name for name, bit in CAPABILITIES.items() if bits >> bit & 1)


def is_filtered() -> bool:
    """A seccomp filter (mode 2) or strict mode lies over this process."""
    return own_status("Seccomp") in ("1", "2")


def has_user_namespace() -> bool:
    """Our root is not the host's."""
    return not _is_first_namespace("user")


def _is_first_namespace(kind: str) -> bool:
    """The namespaces a kernel boots with have fixed inode numbers (``include/linux/proc_ns.h``)."""
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino == _FIRST_NAMESPACES[kind]
    except OSError:
        return True  # a kernel without namespaces


def container() -> str | None:
    """What kind of container this is, as far as it tells; ``None`` outside of one.

    A marker alone proves nothing: images are booted as whole machines too.
    """
    if _is_first_namespace("pid") and _is_first_namespace("user"):
        return None
    told = text_of("/run/systemd/container") or os.environ.get("container", "")  # noqa: SIM112, the spelling of systemd
    if told:
        return told
    for marker, kind in _CONTAINER_MARKERS.items():
        if Path(marker).exists():
            return kind
    return "container"


def misc_minor(device: str) -> int | None:
    """The minor number of a misc device the kernel has, whether or not /dev shows it."""
    for line in text_of("/proc/misc").splitlines():
        words = line.split()
        if len(words) == 2 and words[1] == device:
            return int(words[0])
    return None


def user_name() -> str:
    """The name of the user whose rights are in effect; its number when it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def cpu_field(field: str) -> str:
    """The first processor's line of /proc/cpuinfo."""
    for line in text_of("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


@dataclass(frozen=True, slots=True)
class Host:
    """Whose letter this is. Empty strings are unknown."""

    kernel: str
    machine: str
    hostname: str
    cpu_model: str
    cpu_count: int
    is_virtual: bool
    ram_bytes: int
    user: str
    uid: int
    capabilities: tuple[str, ...]
    container: str | None
    is_filtered: bool

    def to_json(self) -> dict[str, object]:
        """The first record of ``--json``."""
        return {"record": "host", **asdict(self), "capabilities": list(self.capabilities)}

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> Host:
        """The reverse of :meth:`to_json`."""
        fields = {name: value for name, value in message.items() if name != "record"}
        return cls(**{**fields, "capabilities": tuple(fields["capabilities"])})


def describe_host() -> Host:
    """Look at this host and this process."""
    name = os.uname()
    return Host(
        kernel=name.release,
        machine=name.machine,
        hostname=name.nodename,
        cpu_model=cpu_field("model name"),
        cpu_count=len(os.sched_getaffinity(0)),
        is_virtual="hypervisor" in cpu_field("flags").split(),
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"),
        user=user_name(),
        uid=os.geteuid(),
        capabilities=tuple(sorted(capabilities())),
        container=container(),
        is_filtered=is_filtered(),
    )
