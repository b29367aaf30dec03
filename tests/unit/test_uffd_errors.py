"""Typed errors: one errno map, messages that say where, and pickles that survive process
borders.
"""

from __future__ import annotations

import errno
import pickle

import pytest

from uffd import (
    BadAddress,
    InvalidRequest,
    LayoutChanging,
    NotPermitted,
    PageAlreadyPresent,
    PageShared,
    ProcessGone,
    RangeNotRegistered,
    RangeOwnedElsewhere,
    UffdError,
)
from uffd.errors import check


@pytest.mark.parametrize(
    ("code", "operation", "expected"),
    [
        (errno.EEXIST, "UFFDIO_COPY", PageAlreadyPresent),
        (errno.EAGAIN, "UFFDIO_COPY", LayoutChanging),
        (errno.ENOENT, "UFFDIO_COPY", RangeNotRegistered),
        (errno.EPERM, "UFFDIO_API", NotPermitted),
        (errno.ESRCH, "UFFDIO_COPY", ProcessGone),
        (errno.EINVAL, "UFFDIO_COPY", InvalidRequest),
        (errno.EFAULT, "UFFDIO_CONTINUE", BadAddress),
        (errno.EBUSY, "UFFDIO_REGISTER", RangeOwnedElsewhere),
        (errno.EBUSY, "UFFDIO_MOVE", PageShared),
        (errno.EBUSY, "madvise COLLAPSE", UffdError),
        (errno.EIO, "UFFDIO_CONTINUE", UffdError),
    ],
)
def test_a_negative_result_becomes_its_type(
    code: int, operation: str, expected: type[UffdError]
) -> None:
    with pytest.raises(UffdError) as caught:
        check(-code, operation, address=0x7F0000, length=0x1000)
    assert type(caught.value) is expected
    assert isinstance(caught.value, OSError)
    assert (caught.value.errno, caught.value.operation) == (code, operation)
    assert (caught.value.address, caught.value.length) == (0x7F0000, 0x1000)


def test_a_count_passes_through() -> None:
    assert check(0, "UFFDIO_COPY") == 0
    assert check(1 << 40, "UFFDIO_COPY") == 1 << 40


def test_the_message_says_where() -> None:
    error = PageAlreadyPresent(errno.EEXIST, "UFFDIO_COPY", address=0x7F0000, length=0x200000)
    assert str(error) == "UFFDIO_COPY at 0x7f0000+0x200000: File exists"
    assert str(UffdError(errno.ENOSPC, "watchdog")) == "watchdog: No space left on device"


def test_errors_survive_pickling() -> None:
    error = LayoutChanging(errno.EAGAIN, "UFFDIO_COPY", address=4096, length=8192, note="again")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is LayoutChanging
    assert (back.errno, back.operation, back.address, back.length) == (
        11,
        "UFFDIO_COPY",
        4096,
        8192,
    )
    assert str(back) == str(error)
