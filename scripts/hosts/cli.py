"""The command line of ``scripts/vagrant-hosts``, outside of the namespaces."""

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PROJECT = Path(__file__).resolve().parents[2]
VAGRANT = PROJECT / "vagrant"
#: What libvirt keeps on a machine; inside each is a folder of our own.
LIBVIRT_FOLDERS = (
    "/etc/libvirt",
    "/run/libvirt",
    "/var/lib/libvirt",
    "/var/log/libvirt",
    "/var/cache/libvirt",
)
_TOOLS = (
    "vagrant",
    "libvirtd",
    "virsh",
    "dnsmasq",
    "iptables",
    "qemu-img",
    "unshare",
    "setpriv",
    "ssh",
)
_GRACE_S = 30.0
_EPILOG = """\
examples:
  scripts/vagrant-hosts                                      a shell beside the two hosts
  scripts/vagrant-hosts .venv/bin/python -m pytest tests/hosts
  scripts/vagrant-hosts vagrant ssh source -c 'postcopy probe'

COMMAND runs in vagrant/ or, where it is a path, from here. It finds POSTCOPY_HOSTS_SSH, a
configuration for `ssh -F` that knows `source` and `destination` as root, and Vagrant's own
variables. The hosts have no way out of their network.

POSTCOPY_BOX names a public box to use in the place of our own (see vagrant/Vagrantfile).
Exit status: the command's; 2 when the hosts could not be brought up.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if problem := _problem():
        print(f"vagrant-hosts: {problem}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with _state() as state:
            environment = _environment(options, state)
            command = options.command or [os.environ.get("SHELL", "/bin/sh")]
            return _run(state, command, environment)
    except subprocess.CalledProcessError as error:
        print(f"vagrant-hosts: {error.cmd[0]} failed", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vagrant-hosts",
        description="Run a command beside two Vagrant hosts that exist as long as it does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kvm", choices=("yes", "no"), help="default: try to boot a Linux with it")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="(a shell)")
    return parser


def _problem() -> str | None:
    if os.geteuid() != 0:
        return "makes namespaces, bridges and VMs, so it needs root; run it by sudo"
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"no {', '.join(missing)}; run: scripts/setup-debian vagrant"
    return None


@contextmanager
def _state() -> Iterator[Path]:
    """All there is of the hosts on disk, and nothing of it afterwards.

    The path is short: sockets lie in it. Where something is to be mounted there must be a folder;
    those made here are removed when no other pair of hosts stands on them.
    """
    lock = os.open("/var/tmp", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        made = [Path(name) for name in LIBVIRT_FOLDERS if not Path(name).exists()]
        for folder in made:
            folder.mkdir(parents=True, exist_ok=True)
        state = Path(tempfile.mkdtemp(prefix="pch-", dir="/var/tmp"))
        try:
            yield state
        finally:
            shutil.rmtree(state, ignore_errors=True)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for folder in made:
                    folder.rmdir()
    finally:
        os.close(lock)


def _environment(options: argparse.Namespace, state: Path) -> dict[str, str]:
    """Payload and box are made, and a public box is fetched, where there is a network."""
    environment = {
        **os.environ,
        "VAGRANT_HOME": str(state / "vagrant"),
        "VAGRANT_DOTFILE_PATH": str(state / "dot"),
        "VAGRANT_CWD": str(VAGRANT),
        "VAGRANT_DEFAULT_PROVIDER": "libvirt",
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "VAGRANT_NO_COLOR": "1",
        "LIBVIRT_DEFAULT_URI": "qemu:///system",
    }
    _made(VAGRANT / "payload")
    if public := os.environ.get("POSTCOPY_BOX"):
        add = ["vagrant", "box", "add", "--provider", "libvirt", public]
    else:
        add = ["vagrant", "box", "add", "--name", "postcopy", _made(VAGRANT / "box" / "build")]
    print(_made(*add, environment=environment), file=sys.stderr)
    environment["POSTCOPY_KVM"] = options.kvm or _kvm()
    return environment


def _made(*line: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it prints. When we are ended so is it, with all that it
    started, and it is waited for: it has things of its own to remove.

    :raises subprocess.CalledProcessError: it failed.
    """
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as child:
        try:
            said, _ = child.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)
            child.wait()
            raise
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, line)
    return said.strip()


def _kvm() -> str:
    tried = subprocess.run([VAGRANT / "kvm-boots-linux"], stdout=sys.stderr)
    return "yes" if tried.returncode == 0 else "no"


def _run(state: Path, command: Sequence[str], environment: dict[str, str]) -> int:
    """The command's exit status. Its namespaces end with this call."""
    line = ["setpriv", "--pdeathsig", "KILL"]
    line += ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    line += [sys.executable, "-m", "scripts.hosts.inside", str(state), *command]
    child = subprocess.Popen(line, env={**environment, "PYTHONPATH": str(PROJECT)})
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or number != signal.SIGINT:
            child.kill()  # and all of the namespace with it
        asked = True

    old = {number: signal.signal(number, end) for number in _ENDING}
    try:
        return _wait(child, lambda: asked)
    finally:
        child.kill()
        child.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _wait(child: "subprocess.Popen[bytes]", is_asked: Callable[[], bool]) -> int:
    """Ctrl-C reaches the command by itself; it gets some time to say what it has to say."""
    deadline: float | None = None
    while True:
        try:
            status = child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            if is_asked() and deadline is None:
                deadline = time.monotonic() + _GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                child.kill()
        else:
            return 130 if is_asked() else status if status >= 0 else 128 - status
