"""The kernel knows our threads by name."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from uffd.threads import NamedThread


@pytest.mark.parametrize("name", ["fault", "outgoing-return-path"])
def test_the_kernel_knows_the_name(name: str) -> None:
    end = threading.Event()
    thread = NamedThread(target=end.wait, name=name)
    thread.start()
    try:
        comm = Path(f"/proc/self/task/{thread.native_id}/comm").read_text()
    finally:
        end.set()
        thread.join()
    assert comm.strip() == name[:15]
