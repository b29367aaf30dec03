"""What the processes of chaos runs are forked from, once."""

from __future__ import annotations

import pytest

from tests.chaos.forked import start_server


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Started before anybody counts processes and descriptors; it ends with pytest."""
    start_server()
