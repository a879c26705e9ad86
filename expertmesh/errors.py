"""The errors that expertmesh raises on purpose, and the gRPC status that each one becomes.

    MeshError
    ├── InvalidInput        INVALID_ARGUMENT     the caller's fault; `field` names what was wrong
    │   └── NonFiniteInput                       numbers that are NaN or infinite
    ├── WrongPart           FAILED_PRECONDITION  a service was asked for a part it does not hold
    ├── Overloaded          RESOURCE_EXHAUSTED   try again after `retry_after_s`
    ├── Unavailable         UNAVAILABLE          no replica of a stage answers; `stage` names it
    ├── DeadlineExceeded    DEADLINE_EXCEEDED    the caller's time is over
    ├── CorruptReply        DATA_LOSS            a replica answered with something that cannot be right
    │   ├── Failed                               it failed by itself, which the request may be the cause of
    │   └── NotFinite                            it computed NaN or infinity, which may be the model's own doing
    └── SetupError          (never on the wire)  a program cannot start: settings, files, ports
        └── BadCheckpoint                        a model folder is missing, damaged or not understood

The translation to a status lives in `expertmesh.rpc.errors`; this module knows no gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Suspect(Protocol):
    """A replica that may be wrong."""

    def refuse(self, reason: str) -> None:
        """Takes it out of the traffic for a while."""


class MeshError(Exception):
    """Base of every error that expertmesh raises on purpose; its text is fit to be shown to a caller."""


class InvalidInput(MeshError):
    """The request cannot be served as it is.

    Args:
        message: What is wrong and what to do about it.
        field: The request field at fault, in the notation of `google.rpc.BadRequest` (`texts[3]`).
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NonFiniteInput(InvalidInput):
    """Numbers that are to be computed with are NaN or infinite."""


class WrongPart(MeshError):
    """A service was asked for a layer or an expert that it does not hold."""


class Overloaded(MeshError):
    """More work is waiting than can be served in time.

    Args:
        message: What is full.
        retry_after_s: When trying again makes sense, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(MeshError):
    """No replica of a stage answered.

    Args:
        message: What was tried.
        stage: The stage, as the mesh file names it (`gating`, `expert-3`).
        layer: The layer that was asked for, where the stage is an expert.
        expert: The expert that was asked for, where the stage is an expert.
    """

    def __init__(self, message: str, stage: str, layer: int | None = None, expert: int | None = None) -> None:
        super().__init__(message)
        self.stage = stage
        self.layer = layer
        self.expert = expert


class DeadlineExceeded(MeshError):
    """The caller's deadline passed before the answer was there."""


class CorruptReply(MeshError):
    """A replica's reply has the wrong shape, part, digest, or rows that are not finite.

    Args:
        message: What is wrong with it.
        stage: Whose it is, as the mesh file names it; empty where that is not known.
    """

    def __init__(self, message: str, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage
        self.layer: int | None = None
        self.expert: int | None = None


class Failed(CorruptReply):
    """A replica failed by itself: its fault, or what every replica makes of the request."""


class NotFinite(CorruptReply):
    """NaN or infinity was computed: a fault of the replica, or what the model makes of this very sequence.

    Args:
        message: Where.
        stage: Whose it is.
        suspects: The replicas that computed it. It is the model's own where more than one agree.
    """

    def __init__(self, message: str, stage: str = "", suspects: Sequence[Suspect] = ()) -> None:
        super().__init__(message, stage)
        self.suspects = tuple(suspects)
        self.is_agreed = len(self.suspects) > 1


class SetupError(MeshError):
    """A program cannot start as it was told to: settings, files or ports."""


class BadCheckpoint(SetupError):
    """A model folder or a part of it is missing, damaged or not understood."""
