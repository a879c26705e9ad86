"""Text to token ids and back. Knows no model and imports no torch."""
