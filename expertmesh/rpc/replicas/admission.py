"""Who is let into the traffic, by what it says of itself."""

from __future__ import annotations

from expertmesh.errors import WrongPart
from expertmesh.v1.description_pb2 import DescribeResponse


def require_parts(description: DescribeResponse, kind: str, model_digest: str, parts: dict[str, bytes]) -> None:
    """Refuses a replica that is of another kind or model, or that misses parts or has others.

    Raises:
        WrongPart: Says which.
    """
    if description.kind != kind:
        raise WrongPart(f"it is a {description.kind or 'stranger'}, not a {kind}")
    if description.model_digest != model_digest:
        raise WrongPart("it was started with another manifest")
    held = {part.name: part.digest for part in description.parts}
    for name, digest in parts.items():
        if name not in held:
            raise WrongPart(f"it does not hold {name}")
        if held[name] != digest:
            raise WrongPart(f"it holds another {name} than the manifest names")
