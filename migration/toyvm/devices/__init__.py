"""The toy VM's devices, one file each; each registers its own state."""
