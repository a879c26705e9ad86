from expertmesh.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Contract(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTRACT_UNSPECIFIED: _ClassVar[Contract]
    CONTRACT_EXACT: _ClassVar[Contract]
    CONTRACT_MESH_ONLY: _ClassVar[Contract]
    CONTRACT_DEGRADED_OK: _ClassVar[Contract]

class Route(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_UNSPECIFIED: _ClassVar[Route]
    ROUTE_MESH: _ClassVar[Route]
    ROUTE_FULL_MODEL: _ClassVar[Route]
    ROUTE_DEGRADED: _ClassVar[Route]
CONTRACT_UNSPECIFIED: Contract
CONTRACT_EXACT: Contract
CONTRACT_MESH_ONLY: Contract
CONTRACT_DEGRADED_OK: Contract
ROUTE_UNSPECIFIED: Route
ROUTE_MESH: Route
ROUTE_FULL_MODEL: Route
ROUTE_DEGRADED: Route

class ClassifyRequest(_message.Message):
    __slots__ = ("texts", "contract", "route", "include_experts")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    contract: Contract
    route: Route
    include_experts: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., contract: _Optional[_Union[Contract, str]] = ..., route: _Optional[_Union[Route, str]] = ..., include_experts: bool = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("results", "labels", "request_id", "timings")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Classification]
    labels: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    timings: _containers.RepeatedCompositeFieldContainer[StageTiming]
    def __init__(self, results: _Optional[_Iterable[_Union[Classification, _Mapping]]] = ..., labels: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ..., timings: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("label", "probabilities", "logits", "tokens", "truncated", "route", "exact", "profile", "expert_tokens")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    label: str
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    logits: _containers.RepeatedScalarFieldContainer[float]
    tokens: int
    truncated: bool
    route: Route
    exact: bool
    profile: str
    expert_tokens: _tensor_pb2.Tensor
    def __init__(self, label: _Optional[str] = ..., probabilities: _Optional[_Iterable[float]] = ..., logits: _Optional[_Iterable[float]] = ..., tokens: _Optional[int] = ..., truncated: bool = ..., route: _Optional[_Union[Route, str]] = ..., exact: bool = ..., profile: _Optional[str] = ..., expert_tokens: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("stage", "seconds")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    seconds: float
    def __init__(self, stage: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...
