"""A host that is reached by ssh: commands run on it, files go there, its sockets come here."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

#: An emulated host with one busy processor is slow in everything.
PATIENCE_S = 300.0
_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_EXTLINUX = "/boot/extlinux/extlinux.conf"


@dataclass(frozen=True)
class Host:
    """One host.

    :ivar name: as Vagrant, ssh and itself call it.
    :ivar address: on the network migrations take.
    :ivar link: the name of its card there.
    :ivar configuration: for ``ssh -F``; logs in as root, sessions share a connection.
    """

    name: str
    address: str
    configuration: Path
    link: str = "eth1"

    def ssh(self, *options: str) -> list[str]:
        return ["ssh", "-F", str(self.configuration), *options, self.name]

    def try_run(
        self, script: str, *, timeout_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """A shell script there, whatever its status."""
        return subprocess.run(
            [*self.ssh(), script],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def run(self, script: str, *, timeout_s: float = PATIENCE_S) -> str:
        """A shell script there that must succeed; what it printed."""
        done = self.try_run(script, timeout_s=timeout_s)
        assert done.returncode == 0, (
            f"{self.name}: {script}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout.strip()

    def put(self, file: Path, target: str) -> None:
        """Copy a file there."""
        with open(file, "rb") as content:
            subprocess.run(
                [*self.ssh(), f"cat >{shlex.quote(target)}"], stdin=content, check=True, timeout=60
            )

    def forward(self, remote: str, folder: Path) -> str:
        """A socket file here that is a socket file there. Forwarded until the connection ends."""
        local = tempfile.mktemp(prefix=f"{self.name[0]}-", dir=folder)
        words = self.ssh("-O", "forward", "-L", f"{local}:{remote}")
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        return local

    @property
    def kernel(self) -> str:
        return self.run("uname -r")

    @property
    def boot_id(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id")

    # -- what tests change --------------------------------------------------------------

    def set_hugepages(self, count: int) -> int:
        """Resize the pool of 2 MiB pages; how many there are then."""
        return int(self.run(f"echo {count} >{_POOL}/nr_hugepages; cat {_POOL}/nr_hugepages"))

    @property
    def free_hugepages(self) -> int:
        return int(self.run(f"cat {_POOL}/free_hugepages"))

    def link_down(self) -> None:
        self.run(f"ip link set {self.link} down")

    def link_up(self) -> None:
        """A link that comes up has lost its address if it had it by DHCP; ours is set by hand."""
        self.run(
            f"ip link set {self.link} up; ip address replace {self.address}/24 dev {self.link}"
        )

    def shape(self, *words: str) -> None:
        """netem on the migration link: ``delay``, ``20ms``, ``loss``, ``1%``..."""
        self.run(f"tc qdisc replace dev {self.link} root netem {' '.join(words)}")

    def unshape(self) -> None:
        self.try_run(f"tc qdisc del dev {self.link} root")

    def power_off(self) -> None:
        """At once, as when the plug is pulled: nothing is written, nobody is told."""
        order = "echo 1 >/proc/sys/kernel/sysrq; (sleep 0.2; echo o >/proc/sysrq-trigger) &"
        self.try_run(f"{order} exit 0")
        self._forget_connection()

    def power_on(self) -> None:
        subprocess.run(
            ["vagrant", "up", "--no-provision", "--no-tty", self.name],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=3 * PATIENCE_S,
        )
        self.link_up()

    def restart(self) -> None:
        """An orderly restart, until ssh works again."""
        before = self.boot_id
        self.try_run("(sleep 0.2; systemctl reboot) & exit 0")
        deadline = time.monotonic() + 2 * PATIENCE_S
        while True:
            self._forget_connection()
            seen = self.try_run("cat /proc/sys/kernel/random/boot_id", timeout_s=60)
            if seen.returncode == 0 and seen.stdout.strip() not in ("", before):
                break
            assert time.monotonic() < deadline, f"{self.name} did not come back: {seen.stderr}"
            time.sleep(2)  # nothing tells when a machine elsewhere is up
        self.link_up()

    def has_other_kernel(self) -> bool:
        return self.try_run(f"grep -q '^LABEL other' {_EXTLINUX}").returncode == 0

    def boot_kernel(self, label: str) -> None:
        """Restart with ``stock`` or ``other``, our box's two kernels."""
        self.run(f"sed -i 's/^DEFAULT .*/DEFAULT {label}/' {_EXTLINUX} && sync")
        self.restart()

    def _forget_connection(self) -> None:
        """The shared connection of a machine that went away would be waited for."""
        subprocess.run(self.ssh("-O", "exit"), capture_output=True, timeout=60, check=False)
