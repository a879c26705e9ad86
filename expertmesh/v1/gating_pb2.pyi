from expertmesh.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GateRequest(_message.Message):
    __slots__ = ("layer", "rows", "lengths", "places", "shared_apart")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    SHARED_APART_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: _tensor_pb2.Tensor
    lengths: _tensor_pb2.Tensor
    places: _containers.RepeatedCompositeFieldContainer[Place]
    shared_apart: bool
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., lengths: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ..., shared_apart: bool = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("sequence", "epoch", "position")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    sequence: bytes
    epoch: int
    position: int
    def __init__(self, sequence: _Optional[bytes] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class GateResponse(_message.Message):
    __slots__ = ("residual", "expert_input", "expert_ids", "weights")
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_INPUT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    residual: _tensor_pb2.Tensor
    expert_input: _tensor_pb2.Tensor
    expert_ids: _tensor_pb2.Tensor
    weights: _tensor_pb2.Tensor
    def __init__(self, residual: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ShareRequest(_message.Message):
    __slots__ = ("layer", "rows")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ShareResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _tensor_pb2.Tensor
    def __init__(self, rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("sequence", "epoch", "tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: bytes
    epoch: int
    tokens: int
    def __init__(self, sequence: _Optional[bytes] = ..., epoch: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, sequences: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...
