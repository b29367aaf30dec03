"""The ways to a userfaultfd, and what a context got by them can do."""

from __future__ import annotations

import os

from uffd import Advice, Mapping, Mode, PageFault, Userfaultfd, Way, kernel_support

from .. import reasons
from .._native import lib
from ..attempt import (
    MARK,
    Answer,
    Sleeper,
    base_page,
    expect,
    loading,
    next_event,
    next_fault,
    open_context,
    page_bytes,
)
from ..row import Check, Outcome, Tier, yes

_GROUP = "opening"


def device() -> Outcome:
    """/dev/userfaultfd: whoever the file's mode lets in; the sysctl is not asked."""
    error = reasons.refusal(Way.DEVICE, user_mode_only=False)
    return yes("by its file mode") if error is None else reasons.why_not_device(error)


def syscall() -> Outcome:
    """userfaultfd(2) for faults of user and kernel mode."""
    error = reasons.refusal(Way.SYSCALL, user_mode_only=False)
    if error is None:
        return yes("faults of user and kernel mode")
    return reasons.why_not_syscall(error, user_mode_only=False)


def user_mode() -> Outcome:
    """userfaultfd(2) for user-mode faults only, which needs no privilege."""
    error = reasons.refusal(Way.SYSCALL, user_mode_only=True)
    if error is None:
        return yes("what everybody may have")
    return reasons.why_not_syscall(error, user_mode_only=True)


def any_way() -> Outcome:
    """One way is enough."""
    for way, restricted in ((Way.DEVICE, False), (Way.SYSCALL, False), (Way.SYSCALL, True)):
        if reasons.refusal(way, user_mode_only=restricted) is None:
            limits = ", user-mode faults only" if restricted else ""
            return yes(f"by {way.value}{limits}")
    call = reasons.refusal(Way.SYSCALL, user_mode_only=True)
    if call is None:
        return yes(f"by {Way.SYSCALL.value}")
    return reasons.why_not_syscall(call, user_mode_only=True)


def handshake() -> Outcome:
    """UFFDIO_API with nothing asked for: the reported sets."""
    open_context()
    support = kernel_support()
    return yes(f"features {int(support.features):#x}, ioctls {int(support.ioctls):#x}")


def kernel_faults() -> Outcome:
    """write(2) from a missing page sleeps until the page is placed, instead of failing."""
    try:
        uffd = open_context(kernel_faults=True)
    except Answer:
        return reasons.why_no_kernel_faults()
    region = Mapping.anonymous(base_page())
    uffd.register(region)
    receiver, sender = os.pipe()
    view = region.unsafe_view()  # os.write takes its address and touches it without the lock
    writer = Sleeper(lambda: os.write(sender, view))
    next_fault(uffd, region.address)
    uffd.copy(region.address, page_bytes(region.length))
    expect(writer.result() == region.length, "write(2) came back short")
    expect(os.read(receiver, region.length) == page_bytes(region.length), "wrong bytes written")
    return yes("system calls wait for pages")


def other_process() -> Outcome:
    """A context handed to another process, which fills our memory from its own.

    How Firecracker's page-fault handlers and CRIU's lazy pages work. The context belongs to the
    address space that made it; whoever holds its fd serves that.
    """
    uffd = open_context()
    region = Mapping.anonymous(base_page())
    uffd.register(region)
    ours = os.getpid()
    if os.fork() == 0:
        _be_the_handler(uffd.fileno(), ours)
    reader = loading(region.address)
    expect(reader.result() == MARK, "the page came with wrong bytes")
    return yes("handler processes work")


def _be_the_handler(fd: int, parent: int) -> None:
    """In the forked child: answer one fault, end. Never returns."""
    try:
        lib.host_die_with_parent(parent)
        handler = Userfaultfd.from_fd(fd)
        event = next_event(handler)
        if isinstance(event, PageFault):
            handler.copy(event.address, page_bytes(base_page()))
    finally:
        os._exit(0)


def populate() -> Outcome:
    """MADV_POPULATE_READ sleeps for missing pages like an access does, and reports errors."""
    uffd = open_context(kernel_faults=True)
    region = Mapping.anonymous(base_page())
    uffd.register(region, Mode.MISSING)
    reader = Sleeper(lambda: region.advise(Advice.POPULATE_READ))
    next_fault(uffd, region.address)
    uffd.copy(region.address, page_bytes(region.length))
    reader.result()
    return yes("prefetching waits for pages")


def checks() -> list[Check]:
    """The rows about opening."""
    required, optional = Tier.REQUIRED, Tier.OPTIONAL
    return [
        Check("open", "a userfaultfd, one way or another", required, _GROUP, any_way, "4.3"),
        Check("handshake", "UFFDIO_API", required, _GROUP, handshake, "4.3"),
        Check("open-device", "/dev/userfaultfd", optional, _GROUP, device, "6.1"),
        Check("open-syscall", "userfaultfd(2)", optional, _GROUP, syscall, "4.3"),
        Check(
            "open-user-mode",
            "userfaultfd(2) for user mode only",
            optional,
            _GROUP,
            user_mode,
            "5.11",
        ),
        Check(
            "kernel-faults",
            "faults of the kernel are reported",
            optional,
            _GROUP,
            kernel_faults,
            "4.3",
        ),
        Check(
            "other-process",
            "another process serves the faults",
            optional,
            _GROUP,
            other_process,
            "4.3",
            aliases=("fd-passing",),
        ),
        Check("populate", "MADV_POPULATE_READ", optional, _GROUP, populate, "5.14"),
    ]
