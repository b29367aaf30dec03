"""The destination of a migration, stage by stage: see :mod:`.incoming`."""
