"""The proof: mesh against full model, against another implementation's numbers, and a split against its original."""

from __future__ import annotations

from expertmesh.verification.classification import Comparison, compare

__all__ = ["Comparison", "compare"]
