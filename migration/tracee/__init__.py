"""Other processes: what their memory is made of, and changing it from outside.

Looking reads /proc. Changing makes a thread of the other process do system calls (ptrace(2), by
python-ptrace's binding); whatever happens to us meanwhile, that thread goes on where it was.
"""
