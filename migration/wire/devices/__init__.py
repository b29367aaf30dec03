"""Two PC devices of QEMU in our VMState, byte for byte: worked examples of hooks, subsections and
conditional fields.
"""
