"""Threads that the kernel knows by name: in ``top -H``, ``perf``, ``/proc/PID/task/TID/comm``."""

import threading
from contextlib import suppress

_KERNEL_NAME_BYTES = 15  # TASK_COMM_LEN without the NUL


class NamedThread(threading.Thread):
    """A ``threading.Thread`` whose name, cut to 15 bytes, is the kernel's too.

    Python does that by itself from 3.14 on.
    """

    def run(self) -> None:
        # Without /proc the work is done all the same.
        with suppress(OSError), open("/proc/thread-self/comm", "wb", buffering=0) as comm:
            comm.write(self.name.encode()[:_KERNEL_NAME_BYTES])
        super().run()
