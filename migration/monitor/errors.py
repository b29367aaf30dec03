"""What a monitor command answers when it cannot do what it was asked."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

GENERIC = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
ERROR_CLASSES = frozenset(
    {GENERIC, COMMAND_NOT_FOUND, "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"}
)
_OWN_ROOMS = frozenset({"migration", "guestmem", "uffd"})


class QMPError(Exception):
    """An error reply: one of QEMU's classes and a sentence for people.

    :ivar qmp_class: one of :data:`ERROR_CLASSES`.
    :ivar desc: what failed and why, one line.

    Source: QEMU ``qapi/error.json``, ``docs/interop/qmp-spec.rst``.
    """

    def __init__(self, desc: str, *, qmp_class: str = GENERIC) -> None:
        super().__init__(desc)
        self.desc = desc
        self.qmp_class = qmp_class if qmp_class in ERROR_CLASSES else GENERIC

    def reply(self) -> dict[str, object]:
        """The ``error`` object of a reply, without ``id``."""
        return {"error": {"class": self.qmp_class, "desc": self.desc}}


def as_qmp_error(error: Exception, *, doing: str) -> QMPError:
    """The error reply an exception stands for.

    The project's own typed errors are sentences for the user, some with a class (``qmp_class``); an
    ``OSError`` is an answer too (a socket that cannot be bound). Anything else is our bug: the
    client learns that, the log gets the traceback.
    """
    if isinstance(error, QMPError):
        return error
    if type(error).__module__.partition(".")[0] in _OWN_ROOMS:
        return QMPError(str(error), qmp_class=getattr(error, "qmp_class", GENERIC))
    if isinstance(error, OSError):
        return QMPError(f"{doing}: {error.strerror or error}" + _place(error))
    log.error("%s failed unexpectedly", doing, exc_info=error)
    return QMPError(f"{doing}: internal error ({type(error).__name__}: {error})")


def _place(error: OSError) -> str:
    return f" ({error.filename})" if isinstance(error.filename, str) else ""
