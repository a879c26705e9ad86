"""The classifier: last norm, pooling, classes."""
