"""The programs of the mesh, one folder each, all alike: `__main__` starts it, `service` is what it offers."""
