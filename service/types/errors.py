"""The tree of failures: every way a request or a command can be refused or fail.

One class a failure; each states its HTTP status, its machine-readable `code`, the OpenAI-style `kind`
and whether a client may retry. It does not know HTTP libraries, logging or who raises it.
Invariant: `message` is one sentence fit for a stranger's eyes: no path, traceback, repr or key.

    ServiceError
    ├── InvalidRequest 400            wrong value, shape or range; `param` names the field
    │   ├── UnsupportedField 400      known to the protocol, would change the result, not served
    │   ├── UnknownField 400
    │   └── ContextLengthExceeded 400
    ├── Unauthorized 401
    ├── OriginRefused 403
    ├── RouteNotFound 404 / ModelNotFound 404 / MethodNotAllowed 405
    ├── RequestTimeout 408            the client was too slow to send
    ├── PayloadTooLarge 413 / UnsupportedMediaType 415 / HeadersTooLarge 431
    ├── QueueFull 429
    ├── RequestCancelled 499          the client left
    ├── InternalError 500
    │   ├── NumericalFailure 500      the model produced NaN for this sequence
    │   ├── WorkerKilled 500          this request killed its worker; never retried
    │   └── SlowReader 500            the client read too slowly for its bounded stream
    ├── Unavailable 503               loading, draining or worker down
    └── DeadlineExceeded 504
    StartupError (exit code 2)        a command cannot do what it was asked
    ├── SettingsError
    ├── CheckpointError
    └── CapacityError
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """A request fails: `message` for the client, `param` the field at fault, `retry_after_s` when to return."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    """A field has a wrong value, type or range."""

    status, code, kind = 400, "invalid_value", "invalid_request_error"


class UnsupportedField(InvalidRequest):
    """A field of the protocol that would change the result and is not served here."""

    code = "unsupported_parameter"


class UnknownField(InvalidRequest):
    """A field that the protocol does not have."""

    code = "unknown_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens do not fit the version's context."""

    code = "context_length_exceeded"


class Unauthorized(ServiceError):
    """The key is missing or wrong."""

    status, code, kind = 401, "invalid_api_key", "authentication_error"


class OriginRefused(ServiceError):
    """A cross-origin request from an origin that is not listed."""

    status, code, kind = 403, "origin_refused", "permission_error"


class RouteNotFound(ServiceError):
    """No such route."""

    status, code, kind = 404, "not_found", "invalid_request_error"


class ModelNotFound(ServiceError):
    """No version of that name is served."""

    status, code, kind = 404, "model_not_found", "invalid_request_error"


class MethodNotAllowed(ServiceError):
    """The route exists, not with this method."""

    status, code, kind = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(ServiceError):
    """The client took too long to send its request."""

    status, code, kind, retryable = 408, "request_timeout", "invalid_request_error", True


class PayloadTooLarge(ServiceError):
    """The body is over the limit."""

    status, code, kind = 413, "payload_too_large", "invalid_request_error"


class UnsupportedMediaType(ServiceError):
    """The body is not plain JSON (or is compressed)."""

    status, code, kind = 415, "unsupported_media_type", "invalid_request_error"


class HeadersTooLarge(ServiceError):
    """The headers are over the limit in bytes or in number."""

    status, code, kind = 431, "headers_too_large", "invalid_request_error"


class QueueFull(ServiceError):
    """The waiting queue is full; come back after `retry_after_s`."""

    status, code, kind, retryable = 429, "queue_full", "rate_limit_error", True


class RequestCancelled(ServiceError):
    """The client left before the end."""

    status, code, kind = 499, "cancelled", "invalid_request_error"


class InternalError(ServiceError):
    """A fault of ours."""


class NumericalFailure(InternalError):
    """The model produced no finite logits for this sequence."""

    code = "numerical_failure"


class WorkerKilled(InternalError):
    """Executing this request alone ended the worker; it is not tried again."""

    code = "worker_killed"


class SlowReader(InternalError):
    """The client read so slowly that its bounded stream ran full."""

    code = "slow_reader"


class Unavailable(ServiceError):
    """The version is loading, draining or its worker is down."""

    status, code, kind, retryable = 503, "unavailable", "server_error", True


class DeadlineExceeded(ServiceError):
    """The request's deadline passed before it ended."""

    status, code, kind = 504, "deadline_exceeded", "server_error"


class StartupError(Exception):
    """A command cannot do what it was asked: one sentence that says what to do, exit code 2."""


class SettingsError(StartupError):
    """A flag, environment variable or configuration file is wrong."""


class CheckpointError(StartupError):
    """A model directory is missing, broken, unsafe or of an unknown family."""


class CapacityError(StartupError):
    """What was asked does not fit this machine; the message has the numbers."""
