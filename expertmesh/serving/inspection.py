"""`InspectionService`: everything that happens to one text, layer by layer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import numpy as np

from expertmesh.dispatch import ApplyExperts, Embed, Gate, Score, StageCall
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.server import Servicer
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S, check_texts
from expertmesh.v1 import inspection_pb2, inspection_pb2_grpc
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse, LayerTrace
from expertmesh.v1.tensor_pb2 import Tensor
from expertmesh.wire import encode

Observer = Callable[[StageCall, Any], None]
Inspected = Callable[[InspectRequest, Deadline], Awaitable[InspectResponse]]


class Trace:
    """Collects the stage calls of one pass into a reply."""

    def __init__(self) -> None:
        self.response = InspectResponse()

    def observe(self, call: StageCall, result: Any) -> None:
        """Takes down one stage call and its result."""
        match call:
            case Embed(ids_T=ids_T):
                self.response.ids.CopyFrom(_tensor(ids_T, np.int32))
                self.response.embedded.CopyFrom(_tensor(result))
            case Gate(x_TD=x_TD):
                self.response.layers.append(
                    LayerTrace(
                        input=_tensor(x_TD),
                        residual=_tensor(result.residual_TD),
                        expert_input=_tensor(result.expert_input_TD),
                        expert_ids=_tensor(result.expert_ids_TK, np.int32),
                        weights=_tensor(result.weights_TK),
                    )
                )
            case ApplyExperts(counts_E=counts_E):
                self.response.layers[-1].expert_rows.CopyFrom(_tensor(result))
                self.response.layers[-1].expert_counts.CopyFrom(_tensor(counts_E, np.int32))
            case Score():
                self.response.logits.CopyFrom(_tensor(result.logits_BC))


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
        check_texts([request.text], "text")
        return await self._inspected(request, Deadline.of_call(context, DEFAULT_TIMEOUT_S))


def _tensor(array: Any, dtype: Any = np.float32) -> Tensor:
    on_host = array.cpu() if hasattr(array, "cpu") else array  # torch's or numpy's
    return encode(np.asarray(on_host, dtype=dtype))
