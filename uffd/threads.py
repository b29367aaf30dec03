"""Threads that the kernel knows by name: in ``top -H``, ``perf``, ``/proc/PID/task/TID/comm``."""

import threading
from contextlib import suppress

_KERNEL_NAME_BYTES = 15  # TASK_COMM_LEN without the NUL


class NamedThread(threading.Thread):
    """A ``threading.Thread`` whose name, cut to 15 bytes, is the kernel's too.

    Python does that by itself from 3.14 on.
    """

    def start(self) -> None:
        """As ever. It is the starter who tells the name: the thread itself must come to its work,
        which may be to watch over the rest, without giving the GIL away for a file first."""
        super().start()
        # Without /proc, or where it has ended already, the work is done all the same.
        with (
            suppress(OSError),
            open(f"/proc/self/task/{self.native_id}/comm", "wb", buffering=0) as comm,
        ):
            comm.write(self.name.encode()[:_KERNEL_NAME_BYTES])
