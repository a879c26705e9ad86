from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ChangeWeightRequest(_message.Message):
    __slots__ = ("layer", "expert", "delta")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    delta: float
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., delta: _Optional[float] = ...) -> None: ...

class ChangeWeightResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
