"""Kernel-feature validation: what userfaultfd and its neighbours really do on this host.

``scripts/validate-kernel`` is the way in. A battery of cases, each in a child process of its own;
the cases are in :mod:`scripts.validate.cases`, by family. Uses ``uffd`` and ``guestmem`` only.
"""
