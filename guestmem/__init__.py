"""Guest RAM: geometry and bitmaps, mappings and RAMBlocks, dirty tracking."""
