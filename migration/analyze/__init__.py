"""Takes migration streams and snapshots apart: one pass, bounded memory, no guest needed.

Knows the stream and nothing of sockets, guests or kernels: files in, events out. ``stream`` walks a
main channel, ``multifd`` and ``preempt`` its companions, ``session`` puts the channels of one
migration together; ``events`` is what comes out, ``report_json`` and ``report_text`` show it.
"""
