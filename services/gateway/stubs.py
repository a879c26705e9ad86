"""By kind of service, the stub that calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc.aio

from expertmesh.v1.classifier_pb2_grpc import ClassifierServiceStub
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from expertmesh.v1.expert_pb2_grpc import ExpertServiceStub
from expertmesh.v1.gating_pb2_grpc import GatingServiceStub
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from expertmesh.v1.inspection_pb2_grpc import InspectionServiceStub
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceStub


class FullModelStub:
    """The gRPC services of a full model behind one name."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        inference, tokenizer = InferenceServiceStub(channel), TokenizerServiceStub(channel)
        self.Classify, self.Generate = inference.Classify, inference.Generate
        self.Inspect = InspectionServiceStub(channel).Inspect
        self.EncodePrompt, self.DecodeBatch = tokenizer.EncodePrompt, tokenizer.DecodeBatch


STUBS: Mapping[str, Callable[[Any], Any]] = {
    "tokenizer": TokenizerServiceStub,
    "embedding": EmbeddingServiceStub,
    "gating": GatingServiceStub,
    "expert": ExpertServiceStub,
    "classifier": ClassifierServiceStub,
    "full_model": FullModelStub,
}
