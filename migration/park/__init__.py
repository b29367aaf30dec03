"""VMs at rest: taken in from any QEMU, kept as files, given back lazily; and VMs passing through.

This room knows nothing of any machine. RAM blocks come from the stream, device state is kept as
the bytes it is. Its rooms below are the runtime (channels, RAM, the source's side) and the analyser
(where device sections end).
"""
