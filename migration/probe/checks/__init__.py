"""The checks themselves, one module per subject; each has ``checks()``."""
