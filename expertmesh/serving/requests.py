"""What a caller may ask for: the checks of a request, before anything is done for it."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.errors import InvalidInput
from expertmesh.v1.inference_pb2 import (
    CONTRACT_MESH_ONLY,
    ROUTE_DEGRADED,
    ROUTE_FULL_MODEL,
    ClassifyRequest,
    Contract,
    Route,
)

MAX_TEXTS = 1024
MAX_TEXT_BYTES = 64 * 2**10
DEFAULT_TIMEOUT_S = 30.0


def check_classify(request: ClassifyRequest) -> None:
    """Refuses a call that cannot be served as it is.

    Raises:
        InvalidInput: Names the field and says what to do.
    """
    check_texts(request.texts)
    if request.contract not in Contract.values():
        raise InvalidInput(f"contract {request.contract} is not known", "contract")
    if request.route not in Route.values() or request.route == ROUTE_DEGRADED:
        raise InvalidInput("route must be ROUTE_MESH or ROUTE_FULL_MODEL, or be left out", "route")
    if request.route == ROUTE_FULL_MODEL and request.contract == CONTRACT_MESH_ONLY:
        raise InvalidInput("CONTRACT_MESH_ONLY does not go with ROUTE_FULL_MODEL", "contract")


def check_texts(texts: Sequence[str], field: str = "texts") -> None:
    """Refuses no texts, too many, empty and too long ones.

    Raises:
        InvalidInput: Names the text and says what to do.
    """
    if not texts:
        raise InvalidInput("there is no text: give at least one", field)
    if len(texts) > MAX_TEXTS:
        raise InvalidInput(
            f"{len(texts)} texts in one call; at most {MAX_TEXTS}: spread them over several calls", field
        )
    for index, text in enumerate(texts):
        where = f"{field}[{index}]"
        if not text or text.isspace():
            raise InvalidInput(f"{where} is empty", where)
        if len(text) > MAX_TEXT_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
            raise InvalidInput(f"{where} has more than {MAX_TEXT_BYTES} bytes of UTF-8; shorten it", where)
