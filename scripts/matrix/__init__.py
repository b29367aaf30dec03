"""``scripts/kernel-matrix``: the validation and the probe on several kernels, each in a VM.

``debian`` fetches kernels, ``image`` makes what they boot (``cpio`` writes it), ``vm`` runs it,
``guest`` is what runs inside, ``render`` puts the answers side by side, ``explain`` says why they
differ.
"""
