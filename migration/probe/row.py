"""What a check answers, and the row it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """``untested`` means that the question could not be put, never that the answer is unclear."""

    YES = "yes"
    NO = "no"
    UNTESTED = "untested"


class Tier(StrEnum):
    """Who needs it. Only ``required`` rows decide about the exit status (without ``--for``)."""

    REQUIRED = "required"
    HUGEPAGES = "hugepages"
    SHARED = "shared-memory"
    KVM = "kvm"
    OPTIONAL = "optional"


class Cause(StrEnum):
    """Why a row does not say yes: the first word of its reason."""

    PERMISSION = "permission"  # root, a capability or a file mode would change it
    RESTRICTION = "restriction"  # a filter, a container or a security module stands in the way
    KERNEL = "kernel"  # this kernel does not have it
    SETTING = "setting"  # the administrator can switch it on
    RESOURCE = "resource"  # there is none left, or none was set aside
    HARDWARE = "hardware"
    DESIGN = "design"  # no kernel offers it, and none needs to
    PREREQUISITE = "prerequisite"  # another row says no first
    UNEXPECTED = "unexpected"  # it was accepted, and then something else happened
    LOST = "lost"  # the check crashed, hung, or could not be started


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer of one check.

    :ivar detail: what was seen, for a person; may be empty.
    :ivar reason: why not, after the cause's word; ``None`` when the answer is yes.
    :ivar remedy: the exact command or act that changes it; ``None`` when nothing on this host can.
    """

    status: Status
    detail: str = ""
    cause: Cause | None = None
    reason: str | None = None
    remedy: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """For the way from the child that ran the check."""
        return {
            "status": self.status,
            "detail": self.detail,
            "cause": self.cause,
            "reason": self.reason,
            "remedy": self.remedy,
        }

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> Outcome:
        """The reverse. :raises ValueError, KeyError: it was no outcome."""
        cause = message["cause"]
        return cls(
            Status(message["status"]),
            str(message["detail"]),
            None if cause is None else Cause(cause),
            message["reason"],
            message["remedy"],
        )


def yes(detail: str = "") -> Outcome:
    """It was done, and it worked."""
    return Outcome(Status.YES, detail)


def no(cause: Cause, reason: str, remedy: str | None = None, *, detail: str = "") -> Outcome:
    """It was tried, and this is what the kernel said."""
    return Outcome(Status.NO, detail, cause, reason, remedy)


def untested(cause: Cause, reason: str, remedy: str | None = None) -> Outcome:
    """It could not be tried."""
    return Outcome(Status.UNTESTED, "", cause, reason, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """One question to the host, put in a process of its own.

    :ivar name: the row's name, for scripts: lower case, words joined by ``-``.
    :ivar title: the same for people, a few words.
    :ivar group: what the row is about; rows of a group are shown together.
    :ivar since: the kernel release that brings it, ``None`` where that is not the point.
    :ivar run: puts the question. May raise anything, crash, or never return.
    :ivar lock: checks with the same word never run at the same time.
    :ivar weight: how many times the usual patience it deserves.
    :ivar aliases: other names ``--feature`` takes.
    """

    name: str
    title: str
    tier: Tier
    group: str
    run: Callable[[], Outcome]
    since: str | None = None
    lock: str | None = None
    weight: int = 1
    aliases: tuple[str, ...] = ()

    def heading(self) -> dict[str, str | None]:
        """What the row will say besides the answer; for the way out of the child."""
        return {
            "name": self.name,
            "title": self.title,
            "tier": self.tier,
            "group": self.group,
            "since": self.since,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A check and its answer."""

    name: str
    title: str
    tier: Tier
    group: str
    since: str | None
    outcome: Outcome

    @classmethod
    def of(cls, heading: Mapping[str, Any], outcome: Outcome) -> Row:
        """The row of the check with this :meth:`Check.heading`."""
        return cls(
            heading["name"],
            heading["title"],
            Tier(heading["tier"]),
            heading["group"],
            heading["since"],
            outcome,
        )

    @property
    def status(self) -> Status:
        return self.outcome.status

    @property
    def is_yes(self) -> bool:
        return self.outcome.status is Status.YES

    @property
    def is_by_design(self) -> bool:
        """A no that no kernel answers otherwise."""
        return self.outcome.cause is Cause.DESIGN

    @property
    def reason(self) -> str | None:
        """``permission: vm.unprivileged_userfaultfd=0 and no CAP_SYS_PTRACE``."""
        outcome = self.outcome
        return None if outcome.cause is None else f"{outcome.cause}: {outcome.reason}"

    def to_json(self) -> dict[str, object]:
        """A line of ``--json``."""
        return {
            "record": "row",
            "row": self.name,
            "title": self.title,
            "tier": self.tier.value,
            "group": self.group,
            "status": self.outcome.status.value,
            "detail": self.outcome.detail,
            "cause": None if self.outcome.cause is None else self.outcome.cause.value,
            "reason": self.reason,
            "remedy": self.outcome.remedy,
            "since": self.since,
        }
