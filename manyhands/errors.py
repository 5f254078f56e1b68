"""The error tree, and its way over gRPC and back.

    ManyhandsError
    ├── InvalidInput         INVALID_ARGUMENT    a value cannot be right, whatever the state of the server
    ├── OutOfOrder           OUT_OF_RANGE        a stream skipped something
    ├── NotFound             NOT_FOUND
    ├── AlreadyExists        ALREADY_EXISTS      somebody else has the name
    ├── Refused              FAILED_PRECONDITION right request, wrong moment; the message says what must change
    ├── Conflict             ABORTED             another writer was faster; read again and retry
    ├── Overloaded           RESOURCE_EXHAUSTED  with retry_after_s
    ├── Unauthenticated      UNAUTHENTICATED
    ├── NotAllowed           PERMISSION_DENIED   known, but without the role
    ├── NotOffered           UNIMPLEMENTED
    ├── TooLate              DEADLINE_EXCEEDED
    ├── Unreachable          UNAVAILABLE         safe to retry where the contract says so
    ├── Corrupt              DATA_LOSS
    ├── Cancelled            CANCELLED
    └── InternalError        INTERNAL            the peer's fault; its log has the traceback under the incident id

Messages say which field, its value, the limit and the remedy. On the wire an error is a google.rpc.Status with ErrorInfo,
BadRequest (field) and RetryInfo details, so clients in any language can read it.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "manyhands"
STATUS_DETAILS_KEY = "grpc-status-details-bin"

# Status travels in HTTP/2 headers, of which gRPC takes 8 KiB, and each message goes there three times, once escaped.
_MAX_MESSAGE_BYTES = 1000
_MAX_FIELD_BYTES = 200


class ManyhandsError(Exception):
    """Base of every error the library raises on purpose.

    Attributes:
        message: For people: what, value, limit, remedy.
        field: Dotted path of the offending field, or "".
        retry_after_s: Seconds to wait before a retry makes sense, or None.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        if self.field and not re.search(rf"(?<!\w){re.escape(self.field)}(?!\w)", self.message):
            return f"{self.field}: {self.message}"
        return self.message


class InvalidInput(ManyhandsError, ValueError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class OutOfOrder(ManyhandsError):
    code = grpc.StatusCode.OUT_OF_RANGE


class NotFound(ManyhandsError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ManyhandsError):
    code = grpc.StatusCode.ALREADY_EXISTS


class Refused(ManyhandsError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Conflict(ManyhandsError):
    code = grpc.StatusCode.ABORTED


class Overloaded(ManyhandsError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unauthenticated(ManyhandsError):
    code = grpc.StatusCode.UNAUTHENTICATED


class NotAllowed(ManyhandsError):
    code = grpc.StatusCode.PERMISSION_DENIED


class NotOffered(ManyhandsError):
    code = grpc.StatusCode.UNIMPLEMENTED


class TooLate(ManyhandsError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unreachable(ManyhandsError):
    code = grpc.StatusCode.UNAVAILABLE


class Corrupt(ManyhandsError):
    code = grpc.StatusCode.DATA_LOSS


class Cancelled(ManyhandsError):
    code = grpc.StatusCode.CANCELLED


class InternalError(ManyhandsError):
    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[grpc.StatusCode, type[ManyhandsError]] = {cls.code: cls for cls in ManyhandsError.__subclasses__()}
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def to_status(error: ManyhandsError) -> status_pb2.Status:
    """The google.rpc.Status that carries error over the wire."""
    details: list[any_pb2.Any] = []

    def add(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> None:
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)

    add(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shortened(error.field, _MAX_FIELD_BYTES), description=_shortened(error.message, _MAX_MESSAGE_BYTES)
        )
        add(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        add(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=error.code.value[0], message=_shortened(str(error), _MAX_MESSAGE_BYTES), details=details)


def _shortened(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")  # File names can hold what UTF-8, and so the wire, cannot.
    return encoded.decode() if len(encoded) <= max_bytes else encoded[: max_bytes - 3].decode("utf-8", "ignore") + "..."


def from_status(status: status_pb2.Status) -> ManyhandsError:
    """The error that a peer's google.rpc.Status stands for; unknown codes become ManyhandsError."""
    field = ""
    message = status.message
    retry_after_s: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            if bad_request.field_violations:
                field = bad_request.field_violations[0].field
                message = bad_request.field_violations[0].description or message
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_info = error_details_pb2.RetryInfo()
            detail.Unpack(retry_info)
            retry_after_s = retry_info.retry_delay.ToNanoseconds() / 1e9
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    return _BY_CODE.get(code, ManyhandsError)(message, field=field, retry_after_s=retry_after_s)


def from_rpc_error(error: grpc.RpcError) -> ManyhandsError:
    """Turns what a gRPC call (sync or asyncio) raised into the tree above."""
    metadata: Any = error.trailing_metadata()  # Of two types that share no base: pairs in both.
    for key, value in metadata or ():
        if key == STATUS_DETAILS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                break  # A foreign server's details; the plain status says enough.
            return from_status(status)
    code = error.code()
    return _BY_CODE.get(code, ManyhandsError)(error.details() or code.name)
