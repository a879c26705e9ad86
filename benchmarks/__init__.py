"""What the project measures of itself: `python -m benchmarks.NAME`, or all with `make bench`.

Every benchmark compares within one run, prints medians and their spread, and says which of its targets it met.
"""
