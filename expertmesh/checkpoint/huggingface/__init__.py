"""Checkpoints as transformers writes them: config.json, tensors by their names on disk, tokenizer files."""
