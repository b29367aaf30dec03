"""The kernel's userfaultfd interface and the memory calls around it, and nothing else."""
