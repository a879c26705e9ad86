"""Chaos: load that does not wait, faults in the middle of it, and what must be true afterwards.

`load` asks, `faults` and `proxy` break, `vitals` watches, `invariants` judges, `report` tells; `trial` runs them
together and `scenarios` says which. `python -m tests.chaos SCENARIO...` runs some, `make chaos` the long mixture.
"""
