from expertmesh.v1 import inference_pb2 as _inference_pb2
from expertmesh.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InspectRequest(_message.Message):
    __slots__ = ("text", "route", "ids", "chunk")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    text: str
    route: _inference_pb2.Route
    ids: _tensor_pb2.Tensor
    chunk: int
    def __init__(self, text: _Optional[str] = ..., route: _Optional[_Union[_inference_pb2.Route, str]] = ..., ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., chunk: _Optional[int] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("ids", "embedded", "layers", "logits")
    IDS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDED_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    ids: _tensor_pb2.Tensor
    embedded: _tensor_pb2.Tensor
    layers: _containers.RepeatedCompositeFieldContainer[LayerTrace]
    logits: _tensor_pb2.Tensor
    def __init__(self, ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., embedded: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerTrace, _Mapping]]] = ..., logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class LayerTrace(_message.Message):
    __slots__ = ("input", "residual", "expert_input", "expert_ids", "weights", "expert_rows", "expert_counts")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_INPUT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    input: _tensor_pb2.Tensor
    residual: _tensor_pb2.Tensor
    expert_input: _tensor_pb2.Tensor
    expert_ids: _tensor_pb2.Tensor
    weights: _tensor_pb2.Tensor
    expert_rows: _tensor_pb2.Tensor
    expert_counts: _tensor_pb2.Tensor
    def __init__(self, input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., residual: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_counts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
