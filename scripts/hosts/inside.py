"""Inside the namespaces: a libvirt of our own, two hosts, the command.

This is the namespace's first process: when it ends, the kernel ends all others here.
"""

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.hosts.cli import LIBVIRT_FOLDERS, PROJECT

_LIBVIRT_USER = "libvirt-qemu"
_QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = [ ]
cgroup_controllers = [ ]
stdio_handler = "file"
remember_owner = 0
"""
_LIBVIRTD_CONF = 'auth_unix_ro = "none"\nauth_unix_rw = "none"\n'
_LIBVIRTD_S = 60.0
# Sessions share a connection; a host that lost its power is given up after a minute.
_SSH = (
    *("ControlMaster auto", "ControlPersist yes"),
    *("ConnectTimeout 20", "ServerAliveInterval 15", "ServerAliveCountMax 4"),
)


class HostsError(Exception):
    """The hosts are not there; the text says why."""


def main(arguments: Sequence[str]) -> int:
    state, command = Path(arguments[0]), arguments[1:]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        _furnish(state)
        _start_libvirtd(state)
        _bring_up(state)
        configuration = _ssh_configuration(state)
        return _command(command, configuration)
    except HostsError as error:
        print(f"vagrant-hosts: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _furnish(state: Path) -> None:
    """Folders for libvirt, a loopback, and a user that libvirt looks up though it is unused."""
    for name in LIBVIRT_FOLDERS:
        own = state / "libvirt" / name.strip("/")
        own.mkdir(parents=True)
        _run("mount", "--bind", str(own), name)
    Path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    Path("/etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF)
    _run("ip", "link", "set", "lo", "up")
    try:
        pwd.getpwnam(_LIBVIRT_USER)
    except KeyError:
        for name, line in (
            ("passwd", f"{_LIBVIRT_USER}:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n"),
            ("group", f"{_LIBVIRT_USER}:x:64055:\n"),
        ):
            own = state / name
            own.write_text(Path("/etc", name).read_text() + line)
            own.chmod(0o644)
            _run("mount", "--bind", str(own), f"/etc/{name}")


def _start_libvirtd(state: Path) -> None:
    """In a session of its own: Ctrl-C is for the command, not for what it stands on."""
    log = state / "libvirtd.log"
    with open(log, "wb") as out:
        libvirtd = subprocess.Popen(
            ["libvirtd", "--pid-file", "/run/libvirt/libvirtd.pid"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    deadline = time.monotonic() + _LIBVIRTD_S
    while subprocess.run(["virsh", "list"], capture_output=True).returncode:
        if libvirtd.poll() is not None or time.monotonic() > deadline:
            raise HostsError(f"libvirtd does not answer:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)  # nothing tells when it begins to listen


def _bring_up(state: Path) -> None:
    began = time.monotonic()
    how = "KVM" if os.environ.get("POSTCOPY_KVM") == "yes" else "emulation"
    print(f"vagrant-hosts: bringing up source and destination ({how}); minutes", file=sys.stderr)
    line = ["vagrant", "up", "--provider=libvirt", "--no-tty"]
    with open(state / "up.log", "wb") as log:
        done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if done.returncode:
        words = (state / "up.log").read_text(errors="replace")[-4000:]
        raise HostsError(f"vagrant up failed:\n{words}")
    print(f"vagrant-hosts: up after {time.monotonic() - began:.0f} s", file=sys.stderr)


def _ssh_configuration(state: Path) -> Path:
    """Vagrant's, but as root, and one connection a host that all sessions share."""
    line = ["vagrant", "ssh-config"]
    done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise HostsError(f"vagrant ssh-config failed: {done.stderr.strip()}")
    lines = []
    for line_ in done.stdout.splitlines():
        lines.append("  User root" if line_.strip().startswith("User ") else line_)
        if line_.startswith("Host "):
            lines += [f"  {words}" for words in (*_SSH, f"ControlPath {state}/%n")]
    path = state / "ssh-config"
    path.write_text("\n".join(lines) + "\n")
    return path


def _command(command: Sequence[str], configuration: Path) -> int:
    environment = {**os.environ, "POSTCOPY_HOSTS_SSH": str(configuration)}
    child = subprocess.Popen(command, env=environment, cwd=PROJECT)
    while True:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            continue  # it got the same signal, and ends when it has said what it has to say
        return status if status >= 0 else 128 - status


def _run(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"{' '.join(line)}: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
