"""The error tree as gRPC statuses with `google.rpc` details, and back."""

from __future__ import annotations

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from expertmesh import errors

DOMAIN = "expertmesh"
DETAILS_KEY = "grpc-status-details-bin"
MAX_TEXT_CHARACTERS = 300  # three times in the trailer, of which gRPC passes on 8 KiB whatever the characters are

_CODES: dict[type[errors.MeshError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NonFiniteInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.WrongPart: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CorruptReply: grpc.StatusCode.DATA_LOSS,
    errors.Failed: grpc.StatusCode.DATA_LOSS,
    errors.NotFinite: grpc.StatusCode.DATA_LOSS,
}

STATUSES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: errors.MeshError) -> grpc.StatusCode:
    """The status of an error."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def text_of(error: errors.MeshError) -> str:
    """What a caller is told."""
    return str(error)[:MAX_TEXT_CHARACTERS]


def details_of(error: errors.MeshError) -> bytes:
    """The error as a serialised `google.rpc.Status` with ErrorInfo, and RetryInfo or BadRequest where they fit."""
    code = code_of(error)
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=text_of(error))
    status.details.extend(_packed(message) for message in _messages(error))
    data: bytes = status.SerializeToString()
    return data


def _messages(error: errors.MeshError) -> list[Message]:
    reason = "".join("_" + letter if letter.isupper() else letter for letter in type(error).__name__)
    info = error_details_pb2.ErrorInfo(reason=reason.strip("_").upper(), domain=DOMAIN)
    messages: list[Message] = [info]
    match error:
        case errors.InvalidInput(field=field) if field:
            info.metadata["field"] = field
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text_of(error))
            messages.append(error_details_pb2.BadRequest(field_violations=[violation]))
        case errors.Overloaded(retry_after_s=retry_after_s):
            messages.append(_retry_info(retry_after_s))
        case errors.Unavailable(stage=stage, layer=layer, expert=expert):
            info.metadata["stage"] = stage
            if layer is not None:
                info.metadata["layer"] = str(layer)
            if expert is not None:
                info.metadata["expert"] = str(expert)
            messages.append(_retry_info(1.0))
    return messages


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(
        retry_delay=duration_pb2.Duration(nanos=int(seconds * 1e9) % 10**9, seconds=int(seconds))
    )


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def error_info(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """The metadata of the `ErrorInfo` that came with a failed call; empty if there is none."""
    return _info(_details(error))


def from_call(error: grpc.aio.AioRpcError, stage: str) -> errors.MeshError:
    """The error of our tree that a failed call stands for; see `from_status`."""
    return from_status(error.code(), error.details() or "", _details(error), stage)


def from_status(code: grpc.StatusCode, text: str, details: bytes, stage: str) -> errors.MeshError:
    """The error of our tree that a status stands for.

    Args:
        code: How a call to another service of the mesh ended.
        text: What it said.
        details: `google.rpc.Status`, serialised; may be empty.
        stage: That service.
    """
    text = text or code.name
    info = _info(details)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            kind = errors.NonFiniteInput if info.get("reason") == "NON_FINITE_INPUT" else errors.InvalidInput
            return kind(text, info.get("field", ""))
        case grpc.StatusCode.DATA_LOSS if info:
            return (errors.NotFinite if info["reason"] == "NOT_FINITE" else errors.CorruptReply)(text)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return errors.WrongPart(text)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Overloaded(text)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded("the deadline has passed")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return errors.Unavailable(
                text if info else f"{stage} does not answer",
                info.get("stage", stage),
                _number(info.get("layer", "")),
                _number(info.get("expert", "")),
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.WrongPart(f"{stage} does not offer this call; it is off unless its settings switch it on")
        case _:
            return errors.Failed(f"{stage} failed", stage)


def _details(error: grpc.aio.AioRpcError) -> bytes:
    return next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), b"")


def _info(details: bytes) -> dict[str, str]:
    try:
        status = status_pb2.Status.FromString(details)
    except DecodeError:
        return {}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return {"reason": info.reason, **info.metadata}
    return {}


def _number(text: str) -> int | None:
    """What a peer says is a number, if it is one."""
    return int(text) if text.isdecimal() and len(text) < 10 else None
