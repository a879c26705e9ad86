"""Training: data, losses, loop. What it writes is a whole checkpoint, which `expertmesh split` makes into parts."""
