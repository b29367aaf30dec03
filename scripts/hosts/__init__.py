"""Two Vagrant hosts in namespaces of their own: brought up, used by one command, gone with it.

Network, mounts and processes are new namespaces, made by :mod:`.cli` and furnished by
:mod:`.inside`. So a libvirt of this machine is neither used nor disturbed, and what is left to take
down is what the kernel takes down when the namespace's first process ends, however it ends.
"""
