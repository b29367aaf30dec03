"""The native writer of ``tests/native/guestmem_writer.c`` on a thread of its own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path

from guestmem import TARGET_PAGE_BYTES, RAMBlock
from tests.support.need import need

_SOURCE = Path(__file__).parent.parent / "native" / "guestmem_writer.c"


def build_writer(directory: Path) -> ctypes.CDLL:
    """Compile the writer into ``directory`` and load it."""
    compiler = shutil.which("cc")
    need(compiler, "no C compiler", remedy="apt-get install gcc")
    assert compiler is not None
    library = directory / "guestmem_writer.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, _SOURCE], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.writer_run.restype = ctypes.c_uint64
    loaded.writer_run.argtypes = [ctypes.c_uint64] * 4 + [ctypes.c_void_p]
    return loaded


class Writer:
    """Writes random target pages of a block until :meth:`stop`."""

    def __init__(self, library: ctypes.CDLL, block: RAMBlock, *, host: int | None = None) -> None:
        self._stop = ctypes.c_uint32(0)
        self._library = library
        self._arguments = (host or block.host, TARGET_PAGE_BYTES, block.page_count, 12345)
        self.writes = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.writes = self._library.writer_run(*self._arguments, ctypes.byref(self._stop))

    def stop(self) -> int:
        """End the writer; how many writes it did."""
        # An aligned store of a c_uint32 is one machine store; the C side loads it atomically.
        self._stop.value = 1
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        return self.writes
