"""The full model: every stage in one process, the mesh's fallback."""
