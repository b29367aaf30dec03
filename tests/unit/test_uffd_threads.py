"""The kernel knows our threads by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from uffd.threads import NamedThread


@pytest.mark.parametrize("name", ["fault", "outgoing-return-path"])
def test_the_kernel_knows_the_name(name: str) -> None:
    seen: list[str] = []
    thread = NamedThread(
        target=lambda: seen.append(Path("/proc/thread-self/comm").read_text().strip()), name=name
    )
    thread.start()
    thread.join()
    assert seen == [name[:15]]
