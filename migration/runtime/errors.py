"""What can go wrong at run time, in words for the user and with QMP's class for machines."""

from __future__ import annotations

from migration.native import ffi
from migration.wire.errors import RemoteStreamError, TruncatedStreamError


class MigrationError(Exception):
    """A migration command that cannot be carried out, or a migration that failed.

    :ivar qmp_class: QMP's error class, nearly always ``GenericError``.
    :ivar desc: one sentence: what, where, why, what to try.
    """

    def __init__(self, desc: str, *, qmp_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.qmp_class = qmp_class


class ChannelError(MigrationError):
    """The connection broke: guest state on this side is what it was."""


class ChannelClosedError(ChannelError):
    """The peer closed the connection at a place where that is not the end."""


class HugepagesExhausted(MigrationError):
    """A page came and no huge page was free to place it in; nothing was made up in its stead.

    The migration is paused: put pages into the pool, then recover it.
    """


_LOST = frozenset({32, 103, 104, 110, 113, 5, 61})  # EPIPE ECONNABORTED ECONNRESET ETIMEDOUT ...


def native_error(record: object, *, fallback: str) -> Exception:
    """The exception for a ``struct mig_error`` filled by a native loop.

    Bad bytes become :class:`RemoteStreamError` with offset and section; a lost connection
    :class:`ChannelError`, a dry pool :class:`HugepagesExhausted`; anything else
    :class:`MigrationError`.
    """
    code = int(record.code)  # type: ignore[attr-defined]
    message = ffi.string(record.message).decode("utf-8", "replace")  # type: ignore[attr-defined]
    section = ffi.string(record.section).decode("utf-8", "replace")  # type: ignore[attr-defined]
    offset = int(record.offset)  # type: ignore[attr-defined]
    if code in (74, 71):  # EBADMSG, EPROTO
        return RemoteStreamError(message, offset=offset, section=section or None)
    if code in _LOST:
        where = (
            f"{section} at stream offset {offset:#x}" if section else f"stream offset {offset:#x}"
        )
        return ChannelError(f"{where}: {message}")
    if code == 28:  # ENOSPC
        return HugepagesExhausted(message)
    if code == 125:  # ECANCELED
        return MigrationError("stopped")
    return MigrationError(message or fallback)


def is_lost_channel(error: BaseException) -> bool:
    """Whether the connection broke, as opposed to bad bytes or a local fault."""
    return isinstance(error, ChannelError | ConnectionError | TruncatedStreamError | TimeoutError)
