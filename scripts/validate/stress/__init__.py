"""The seeded stress: random mixes of operations against a model of what each page must hold."""
