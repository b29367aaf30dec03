"""What a migration may leave behind in a process, told apart from what others do to the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.leaks import leaked, snapshot


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if this process has more descriptors, threads, guest mappings or children afterwards.

    Huge pages are held through mappings and descriptors only, so these tell of them too. The pool
    and the temporary folders belong to everybody: other runs on this host change them meanwhile.
    """
    before = dataclasses.replace(snapshot(prefixes=()), hugepages={})
    yield
    found = leaked(before, prefixes=())
    assert not found, "left behind:\n" + "\n".join(found)
