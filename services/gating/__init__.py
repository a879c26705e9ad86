"""Gating: attention and router of every layer."""
