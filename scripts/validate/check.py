"""What a case says about what it saw: checks that count themselves, skips that name a remedy."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CheckFailed(Exception):
    """The kernel did something else than the case expects."""


class Skipped(Exception):
    """The case cannot run here.

    :ivar remedy: the exact command that would change that; ``None`` when nothing on this host can.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class Tally:
    """Checks made by this process, so that a case that checks nothing is seen."""

    made = 0


def expect(ok: object, what: str) -> None:
    """:raises CheckFailed: ``ok`` is false; ``what`` is the statement that should hold."""
    Tally.made += 1
    if not ok:
        raise CheckFailed(what)


def same(got: object, expected: object, what: str) -> None:
    """:raises CheckFailed: they differ. Long bytes are shown by their first difference."""
    Tally.made += 1
    if got != expected:
        raise CheckFailed(f"{what}: {_difference(got, expected)}")


def _difference(got: object, expected: object) -> str:
    if isinstance(got, bytes) and isinstance(expected, bytes) and len(expected) > 16:
        if len(got) != len(expected):
            return f"{len(got)} bytes, not {len(expected)}"
        at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
        return f"byte {at:#x} is {got[at]:#04x}, not {expected[at]:#04x}"
    if isinstance(got, int) and isinstance(expected, int) and max(got, expected) > 1 << 16:
        return f"{got:#x}, not {expected:#x}"
    return f"{got!r}, not {expected!r}"


def code_name(code: int) -> str:
    """``EEXIST`` for 17."""
    return errno.errorcode.get(code, str(code))


@contextmanager
def refused(*codes: int, what: str) -> Iterator[None]:
    """The block must raise an ``OSError`` with one of ``codes``.

    :raises CheckFailed: it succeeds or fails otherwise.
    """
    Tally.made += 1
    expected = " or ".join(map(code_name, codes))
    try:
        yield
    except OSError as error:
        if error.errno in codes:
            return
        raise CheckFailed(f"{what}: {code_name(error.errno or 0)}, not {expected}") from error
    raise CheckFailed(f"{what}: succeeded, not {expected}")


def outcome(action: Callable[[], object]) -> str:
    """``succeeds``, or the name of the error it was refused with."""
    try:
        action()
    except OSError as error:
        return code_name(error.errno or 0)
    return "succeeds"


def refuses(call: int, code: int, what: str) -> None:
    """A raw result: minus ``code``."""
    same(code_name(-call) if call < 0 else f"success ({call})", code_name(code), what)
