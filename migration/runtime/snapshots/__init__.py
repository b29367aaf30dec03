"""Snapshots of a stopped or running machine on disk: see :mod:`.snapshots`."""
