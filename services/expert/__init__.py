"""Experts: one expert of every layer, or any set of (layer, expert)."""
