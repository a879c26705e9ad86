from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class LinkRequest(_message.Message):
    __slots__ = ("call", "method", "timeout_us", "request_id", "trace", "message", "checksum")
    class TraceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CALL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    call: int
    method: str
    timeout_us: int
    request_id: str
    trace: _containers.ScalarMap[str, str]
    message: bytes
    checksum: int
    def __init__(self, call: _Optional[int] = ..., method: _Optional[str] = ..., timeout_us: _Optional[int] = ..., request_id: _Optional[str] = ..., trace: _Optional[_Mapping[str, str]] = ..., message: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class LinkResponse(_message.Message):
    __slots__ = ("call", "code", "text", "details", "message", "checksum")
    CALL_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    call: int
    code: int
    text: str
    details: bytes
    message: bytes
    checksum: int
    def __init__(self, call: _Optional[int] = ..., code: _Optional[int] = ..., text: _Optional[str] = ..., details: _Optional[bytes] = ..., message: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...
