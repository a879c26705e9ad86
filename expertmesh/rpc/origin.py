"""What process gave a reply, as trailing metadata: behind one address there may be many, and one was asked before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.v1.description_pb2 import DescribeResponse

MODEL_KEY = "expertmesh-model"
PROFILE_KEY = "expertmesh-profile"


@dataclass(frozen=True)
class Origin:
    """Where a reply comes from.

    Attributes:
        model_digest: Digest of the manifest that the process was started with: spec and parts.
        profile: Its numeric profile, whose last word is the fingerprint; empty if it computes nothing.
    """

    model_digest: str
    profile: str

    @classmethod
    def of_description(cls, description: DescribeResponse) -> Origin:
        """What a process that describes itself so will say of its replies."""
        return cls(description.model_digest, description.profile)

    @classmethod
    def of_metadata(cls, metadata: Iterable[tuple[str, str | bytes]] | None) -> Origin:
        """Reads a reply's trailing metadata; what is missing is empty."""
        found = {key: value for key, value in metadata or () if isinstance(value, str)}
        return cls(found.get(MODEL_KEY, ""), found.get(PROFILE_KEY, ""))

    def to_metadata(self) -> tuple[tuple[str, str], ...]:
        """As trailing metadata."""
        return ((MODEL_KEY, self.model_digest), (PROFILE_KEY, self.profile))
