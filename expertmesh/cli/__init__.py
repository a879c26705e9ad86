"""The verbs of the `expertmesh` command, one module each."""
