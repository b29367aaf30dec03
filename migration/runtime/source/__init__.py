"""The source of a migration, stage by stage: see :mod:`.outgoing`."""
