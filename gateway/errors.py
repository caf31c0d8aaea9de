"""Every error that a client can be told of, as one tree. A leaf: imports nothing of ours.

    TunegateError                   500 server_error
    ├── RequestError                400 invalid_request_error
    │   ├── ContextLengthExceeded   400 context_length_exceeded
    │   ├── NotFound                404
    │   │   └── ModelNotFound       404 model_not_found
    │   ├── MethodNotAllowed        405
    │   ├── BodyTooLarge            413
    │   ├── UnsupportedMediaType    415
    │   └── TooSlow, HeadersTooLarge    408, 431: in `connection.py`, before there is a request
    ├── Unauthorized                401 invalid_api_key
    ├── Misdirected                 421
    ├── Forbidden                   403
    ├── RateLimited                 429 rate_limit_exceeded, Retry-After
    ├── EngineError                 502
    │   ├── EngineUnavailable       503, Retry-After
    │   └── EngineTimeout           504
    ├── StoreUnavailable            503, Retry-After
    └── SettingsError               never on the wire: refuses to start

Raised where the fault is known, turned into HTTP once, in `app.py`.
"""

from __future__ import annotations


class TunegateError(Exception):
    """An error with OpenAI's four fields; `message` names the value, the rule and the fix."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object, all four fields always present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class RequestError(TunegateError):
    """The client's fault: what it sent breaks a rule that the message names."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class NotFound(RequestError):
    status = 404


class ModelNotFound(NotFound):
    """An unknown model, in the words OpenAI's clients look for."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist or you do not have access to it.", param="model")


class MethodNotAllowed(RequestError):
    status = 405


class BodyTooLarge(RequestError):
    status = 413


class UnsupportedMediaType(RequestError):
    status = 415


class Unauthorized(TunegateError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Misdirected(TunegateError):
    status = 421
    type = "invalid_request_error"


class Forbidden(TunegateError):
    status = 403
    type = "invalid_request_error"


class RateLimited(TunegateError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineError(TunegateError):
    """An engine answered with something that is not the client's fault."""

    status = 502


class EngineUnavailable(EngineError):
    status = 503
    code = "engine_unavailable"


class EngineTimeout(EngineError):
    status = 504
    code = "engine_timeout"


class StoreUnavailable(TunegateError):
    status = 503
    code = "store_unavailable"


class SettingsError(TunegateError):
    """Settings that cannot be served; the process refuses to start and says why."""
