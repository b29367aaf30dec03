"""See docs/architecture.md for what this room owns and what it refuses to know."""
