"""The Open Inference Protocol, version 2, over gRPC: the same answers for clients of that protocol.

One model: input `text` (BYTES, [N]); outputs `label` (BYTES, [N]), `probabilities` and `logits` (FP32, [N, C]),
`route` (BYTES, [N]).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
import numpy as np

from expertmesh import __version__
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import InvalidInput
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.server import Servicer
from expertmesh.serving.inference import InferenceServicer, parse_route, route_name
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S
from expertmesh.v1.inference_pb2 import ClassifyRequest, ClassifyResponse
from inference import grpc_service_pb2 as oip
from inference import grpc_service_pb2_grpc as oip_grpc

INPUT = "text"
VERSION = "1"


class OpenInferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """Translates between the two contracts.

    Args:
        manifest: The model.
        inference: Answers requests.
        is_ready: Whether some route can serve.
    """

    def __init__(self, manifest: Manifest, inference: InferenceServicer, is_ready: Callable[[], bool]) -> None:
        self._manifest = manifest
        self._inference = inference
        self._is_ready = is_ready

    def registration(self) -> Servicer:
        """How this is added to a server."""
        return Servicer("inference.GRPCInferenceService", oip_grpc.add_GRPCInferenceServiceServicer_to_server, self)

    async def ServerLive(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """It answers, so it lives."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """Whether some route can serve."""
        return oip.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """Whether the model can be asked."""
        return oip.ModelReadyResponse(ready=self._has(request.name, request.version) and self._is_ready())

    async def ServerMetadata(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """Name and version of the server."""
        return oip.ServerMetadataResponse(name="expertmesh", version=__version__)

    async def ModelMetadata(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        """Inputs and outputs of the model."""
        await self._require(request.name, request.version, context)
        classes = len(self._manifest.spec.head.labels)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=self._manifest.name,
            versions=[VERSION],
            platform="expertmesh",
            inputs=[tensor(name=INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                tensor(name="label", datatype="BYTES", shape=[-1]),
                tensor(name="probabilities", datatype="FP32", shape=[-1, classes]),
                tensor(name="logits", datatype="FP32", shape=[-1, classes]),
                tensor(name="route", datatype="BYTES", shape=[-1]),
            ],
        )

    async def ModelInfer(self, request: oip.ModelInferRequest, context: grpc.aio.ServicerContext) -> Any:
        """Classifies the texts of the one input tensor."""
        await self._require(request.model_name, request.model_version, context)
        texts = _texts(request)
        route = parse_route(request.parameters["route"].string_param if "route" in request.parameters else "")
        message = ClassifyRequest(texts=texts, route=route)
        response = await self._inference.answer(message, Deadline.of_call(context, DEFAULT_TIMEOUT_S))
        return self._reply(request, response)

    def _has(self, name: str, version: str) -> bool:
        return name == self._manifest.name and version in ("", VERSION)

    async def _require(self, name: str, version: str, context: grpc.aio.ServicerContext) -> None:
        if not self._has(name, version):
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"the model here is {self._manifest.name}, version {VERSION}"
            )

    def _reply(self, request: oip.ModelInferRequest, response: ClassifyResponse) -> oip.ModelInferResponse:
        results = response.results
        probabilities = np.array([result.probabilities for result in results], "<f4")
        logits = np.array([result.logits for result in results], "<f4")
        outputs = {
            "label": ("BYTES", [len(results)], _join([result.label.encode() for result in results])),
            "probabilities": ("FP32", list(probabilities.shape), probabilities.tobytes()),
            "logits": ("FP32", list(logits.shape), logits.tobytes()),
            "route": ("BYTES", [len(results)], _join([route_name(result.route).encode() for result in results])),
        }
        wanted = [output.name for output in request.outputs] or list(outputs)
        for name in wanted:
            if name not in outputs:
                raise InvalidInput(f"there is no output {name[:64]!r}; there are: {', '.join(outputs)}", "outputs")
        tensor = oip.ModelInferResponse.InferOutputTensor
        return oip.ModelInferResponse(
            model_name=self._manifest.name,
            model_version=VERSION,
            id=request.id,
            outputs=[tensor(name=name, datatype=outputs[name][0], shape=outputs[name][1]) for name in wanted],
            raw_output_contents=[outputs[name][2] for name in wanted],
        )


def _texts(request: oip.ModelInferRequest) -> list[str]:
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        raise InvalidInput(f"there must be one input, named {INPUT}", "inputs")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES" or len(tensor.shape) not in (1, 2):
        raise InvalidInput(f"{INPUT} must have datatype BYTES and shape [N] or [N, 1]", "inputs")
    if request.raw_input_contents:
        if len(request.raw_input_contents) != 1:
            raise InvalidInput("raw_input_contents must hold one entry for each input", "raw_input_contents")
        items: Sequence[bytes] = _split(request.raw_input_contents[0])
    else:
        items = tensor.contents.bytes_contents
    rows = tensor.shape[0] if len(tensor.shape) == 1 or tensor.shape[1] == 1 else -1
    if rows != len(items):
        raise InvalidInput(f"shape {list(tensor.shape)} does not fit {len(items)} elements", "inputs")
    try:
        return [item.decode() for item in items]
    except UnicodeDecodeError:
        raise InvalidInput(f"{INPUT} is not UTF-8", "inputs") from None


def _split(data: bytes) -> list[bytes]:
    """BYTES elements in raw form: each a 4-byte little-endian length and that many bytes."""
    items = []
    start = 0
    while start < len(data):
        if start + 4 > len(data):
            raise InvalidInput("raw_input_contents ends within a length", "raw_input_contents")
        (length,) = struct.unpack_from("<I", data, start)
        if start + 4 + length > len(data):
            raise InvalidInput("raw_input_contents ends within an element", "raw_input_contents")
        items.append(data[start + 4 : start + 4 + length])
        start += 4 + length
    return items


def _join(items: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)
