"""The classifier: the head of a model, which gives classes or next tokens."""
