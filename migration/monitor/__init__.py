"""The monitor room: how people and programs steer a running VM.

QMP (JSON, for programs) and HMP (lines, for people) over unix and loopback TCP sockets or the
terminal.

What it owns: sockets of its own, one I/O thread, one thread per client that executes commands.
What it refuses to know: guest RAM. No code here ever touches a guest page, so a missing page can
make one *command* wait (inside the machine), never the monitor's I/O: greeting, other clients,
out-of-band commands and events go on while a thread sleeps in a page fault with the GIL released.

The layers, bottom up: :mod:`json_stream` (bytes to values, bounded), :mod:`dispatch` (values to
replies, no I/O), :mod:`connection` (one socket, bounded both ways), :mod:`qmp_session` and
:mod:`hmp_session` (the two protocols on a connection), :mod:`server` (the thread, the listeners).
"""
