"""The gateway: callers' requests through the mesh. It holds no weights and imports no torch."""
