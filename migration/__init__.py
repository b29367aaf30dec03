"""Live migration of a guest: the wire, the engine, the data plane, the toy VM and the tools."""
