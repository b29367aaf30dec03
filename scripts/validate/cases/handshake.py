"""Getting a userfaultfd and its handshake."""

import os
import select
import struct
from pathlib import Path

from scripts.validate import raw
from scripts.validate.actors import in_child, loading, next_fault
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, refused, refuses, same
from scripts.validate.host import feature
from scripts.validate.kinds import ANON
from uffd import Feature, Ioctls, NotPermitted, Userfaultfd
from uffd._native import lib
from uffd.flags import USER_MODE_ONLY
from uffd.opening import Way, open_fd

WAYS = {"syscall": Way.SYSCALL, "device": Way.DEVICE}
_UNKNOWN_BIT = 63


def _open(bench: Bench, *, nonblocking: bool = True) -> int:
    way = WAYS[bench.variant]
    fd, _ = open_fd(user_mode_only=False, nonblocking=nonblocking, ways=(way,))
    return fd


def _shake(fd: int, api: int, features: int) -> tuple[int, int, int, int]:
    """Result, and the three words as the kernel left them."""
    argument = bytearray(struct.pack("<QQQ", api, features, raw.PRESET))
    result = raw.ioctl(fd, raw.UFFDIO_API, argument)
    return (result, *struct.unpack("<QQQ", argument))


@case("unit", on=WAYS, name="api-handshake")
def api_handshake(bench: Bench) -> None:
    """A wrong API number and an unknown feature bit are refused with the structure zeroed; no
    features succeeds afterwards on the same fd and names REGISTER, UNREGISTER, API; a second
    handshake is refused.
    """
    fd = _open(bench)
    same(_shake(fd, 0xAB, 0), (-22, 0, 0, 0), "handshake with a wrong API number")
    same(_shake(fd, 0xAA, 1 << _UNKNOWN_BIT), (-22, 0, 0, 0), "handshake with feature bit 63")
    result, api, features, ioctls = _shake(fd, 0xAA, 0)
    same((result, api), (0, 0xAA), "handshake without features on the same fd")
    wanted = int(Ioctls.REGISTER | Ioctls.UNREGISTER | Ioctls.API)
    same(ioctls & wanted, wanted, "operations named")
    same(Feature(features), bench.features, "features reported, whatever was asked")
    same(_shake(fd, 0xAA, 0), (-22, 0, 0, 0), "second handshake")


@case("unit", on=WAYS, name="before-handshake")
def before_handshake(bench: Bench) -> None:
    """Before the handshake REGISTER and read are refused and poll says error."""
    fd = _open(bench)
    argument = bytearray(struct.pack("<QQQQ", 0, os.sysconf("SC_PAGESIZE"), 1, 0))
    refuses(raw.ioctl(fd, raw.UFFDIO_REGISTER, argument), 22, "REGISTER before the handshake")
    with refused(22, what="read before the handshake"):
        os.read(fd, 32)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    same(poller.poll(0), [(fd, select.POLLERR)], "poll before the handshake")


@case("unit", on=WAYS, name="open-flags")
def open_flags(bench: Bench) -> None:
    """An unknown open flag is refused; O_CLOEXEC, O_NONBLOCK and USER_MODE_ONLY are taken; the fd
    is read-only.
    """
    opener = lib.uffd_open_dev if bench.variant == "device" else lib.uffd_open_syscall
    refuses(opener(os.O_APPEND), 22, "open with an unknown flag")
    for flags in (0, os.O_CLOEXEC, os.O_NONBLOCK, USER_MODE_ONLY):
        fd = opener(flags)
        expect(fd >= 0, f"open with flags {flags:#x}")
        same(os.get_inheritable(fd), not flags & os.O_CLOEXEC, f"inheritable, flags {flags:#x}")
        same(os.get_blocking(fd), not flags & os.O_NONBLOCK, f"blocking, flags {flags:#x}")
        with refused(9, what="write(2) to it"):
            os.write(fd, b"x")


@case("unit", name="feature-bits")
def feature_bits(bench: Bench) -> None:
    """Each reported feature can be asked for alone and shows in fdinfo; each other bit is
    refused.
    """
    for bit in range(64):
        wanted = Feature(1 << bit)
        if wanted == Feature.RWP_ASYNC and wanted in bench.features:
            wanted |= Feature.RWP  # it needs that one
        if wanted in bench.features:
            with bench.open(wanted) as uffd:
                adopted = Userfaultfd.from_fd(os.dup(uffd.fileno()))
                same(int(adopted.features) & int(wanted), int(wanted), f"bit {bit} in fdinfo")
        else:
            fd, _ = open_fd(user_mode_only=False, nonblocking=True, ways=(Way.SYSCALL,))
            refuses(_shake(fd, 0xAA, int(wanted))[0], 22, f"feature bit {bit}, not reported")
            os.close(fd)


@case("unit", name="fork-event-privilege", needs=[feature(Feature.EVENT_FORK)])
def fork_event_privilege(bench: Bench) -> None:
    """The fork event needs CAP_SYS_PTRACE: without privileges it is refused, and an unprivileged
    context of user-mode faults is to be had.
    """

    def unprivileged() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        fd, _ = open_fd(user_mode_only=True, nonblocking=True, ways=(Way.SYSCALL,))
        refuses(_shake(fd, 0xAA, int(Feature.EVENT_FORK))[0], 1, "EVENT_FORK unprivileged")
        same(_shake(fd, 0xAA, 0)[0], 0, "handshake of a user-mode context")
        allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
        try:
            Userfaultfd.open(user_mode_only=False, ways=(Way.SYSCALL,)).close()
        except NotPermitted:
            expect(not allowed, "the sysctl lets users in")
        else:
            expect(allowed, "an unprivileged user is kept out of kernel faults")

    if not bench.host.is_root:
        raise Skipped("already unprivileged", "run as root")
    in_child(unprivileged)


@case("unit", name="fdinfo")
def fdinfo(bench: Bench) -> None:
    """fdinfo counts waiters: pending before the message is read, total until it is answered."""
    memory, uffd = ANON.map(2), bench.open()
    uffd.register(memory)
    sleepers = [loading(memory.page(i)) for i in range(2)]
    next_fault(uffd)
    next_fault(uffd)
    depth = uffd.queue_depth()
    same((depth.pending, depth.total), (0, 2), "queue depth with two messages read")
    uffd.copy(memory.address, bytes(memory.length))
    for sleeper in sleepers:
        same(sleeper.join(), 0, "value loaded")
    same(uffd.queue_depth().total, 0, "queue depth afterwards")
