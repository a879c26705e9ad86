"""`InspectionService`: everything that happens to one text or sequence, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh.dispatch import ApplyExperts, Embed, Gate, Score, StageCall
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.server import Servicer
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S, check_texts
from expertmesh.v1 import inspection_pb2, inspection_pb2_grpc
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse, LayerTrace
from expertmesh.wire import encode, widen

WHOLE = -1  # in place of a layer, for what belongs to none

Observer = Callable[[StageCall, Any], None]
Inspected = Callable[[InspectRequest, Deadline], Awaitable[InspectResponse]]


class Trace:
    """Collects the stage calls of one text, or of one sequence chunk after chunk, into a reply."""

    def __init__(self) -> None:
        self._parts: defaultdict[tuple[int, str], list[npt.NDArray[Any]]] = defaultdict(list)

    def observe(self, call: StageCall, result: Any) -> None:
        """Takes down one stage call and its result."""
        match call:
            case Embed(ids_T=ids_T):
                self._add(WHOLE, "ids", ids_T, np.int32)
                self._add(WHOLE, "embedded", result)
            case Gate(layer=layer, x_TD=x_TD):
                self._add(layer, "input", x_TD)
                self._add(layer, "residual", result.residual_TD)
                if result.expert_ids_TK is not None:
                    self._add(layer, "expert_input", result.expert_input_TD)
                    self._add(layer, "expert_ids", result.expert_ids_TK, np.int32)
                    self._add(layer, "weights", result.weights_TK)
            case ApplyExperts(layer=layer, counts_E=counts_E):
                self._add(layer, "expert_rows", result.rows_ND)
                self._add(layer, "expert_counts", counts_E, np.int32)
            case Score():
                self._add(WHOLE, "logits", result.logits_BC)

    @property
    def response(self) -> InspectResponse:
        """What was taken down so far."""
        layers = max((layer for layer, _ in self._parts), default=-1) + 1
        response = InspectResponse(layers=[LayerTrace() for _ in range(layers)])
        for (layer, name), parts in self._parts.items():
            message = response if layer == WHOLE else response.layers[layer]
            getattr(message, name).CopyFrom(encode(np.concatenate(parts)))
        return response

    def _add(self, layer: int, name: str, array: Any, dtype: Any = np.float32) -> None:
        on_host = to_host(array)
        self._parts[layer, name].append(np.array(widen(on_host) if dtype is np.float32 else on_host, dtype))


class InspectionServicer(inspection_pb2_grpc.InspectionServiceServicer):
    """Runs one text under observation.

    Args:
        inspected: Runs it by the route that is asked for and gives its trace.
    """

    def __init__(self, inspected: Inspected) -> None:
        self._inspected = inspected

    def registration(self) -> Servicer:
        """How this is added to a server."""
        name = inspection_pb2.DESCRIPTOR.services_by_name["InspectionService"].full_name
        return Servicer(name, inspection_pb2_grpc.add_InspectionServiceServicer_to_server, self)

    async def Inspect(self, request: InspectRequest, context: grpc.aio.ServicerContext) -> InspectResponse:
        """Gives the trace of one text."""
        if not request.HasField("ids"):
            check_texts([request.text], "text")
        return await self._inspected(request, Deadline.of_call(context, DEFAULT_TIMEOUT_S))


def to_host(array: Any) -> npt.NDArray[Any]:
    """An array, numpy's or torch's, as numpy's; bfloat16 in float32."""
    if not hasattr(array, "cpu"):
        return np.asarray(array)
    on_host = array.cpu()
    return np.asarray(on_host if on_host.dtype.itemsize != 2 else on_host.float())


def chunks(tokens: int, chunk: int) -> list[slice]:
    """The chunks that so many tokens go through the layers in; 0: all at once."""
    size = chunk or tokens
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
