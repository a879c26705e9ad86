from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Misbehaviour(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISBEHAVIOUR_UNSPECIFIED: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_NAN_ROWS: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_WRONG_SHAPE: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_WRONG_DIGEST: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_TRUNCATED: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_GARBAGE: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_SLOW: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_OUT_OF_MEMORY: _ClassVar[Misbehaviour]
    MISBEHAVIOUR_HANG: _ClassVar[Misbehaviour]
MISBEHAVIOUR_UNSPECIFIED: Misbehaviour
MISBEHAVIOUR_NAN_ROWS: Misbehaviour
MISBEHAVIOUR_WRONG_SHAPE: Misbehaviour
MISBEHAVIOUR_WRONG_DIGEST: Misbehaviour
MISBEHAVIOUR_TRUNCATED: Misbehaviour
MISBEHAVIOUR_GARBAGE: Misbehaviour
MISBEHAVIOUR_SLOW: Misbehaviour
MISBEHAVIOUR_OUT_OF_MEMORY: Misbehaviour
MISBEHAVIOUR_HANG: Misbehaviour

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

class MisbehaveRequest(_message.Message):
    __slots__ = ("kind", "calls", "seconds", "delay_ms")
    KIND_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    kind: Misbehaviour
    calls: int
    seconds: float
    delay_ms: int
    def __init__(self, kind: _Optional[_Union[Misbehaviour, str]] = ..., calls: _Optional[int] = ..., seconds: _Optional[float] = ..., delay_ms: _Optional[int] = ...) -> None: ...

class MisbehaveResponse(_message.Message):
    __slots__ = ("gone_wrong",)
    GONE_WRONG_FIELD_NUMBER: _ClassVar[int]
    gone_wrong: int
    def __init__(self, gone_wrong: _Optional[int] = ...) -> None: ...
