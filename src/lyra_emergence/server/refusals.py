"""Errors as OpenAI has them: a status, and `{"error": {"message", "type", "param", "code"}}` with Lyra's hint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from openai.types.shared import ErrorObject
from pydantic import BaseModel
from starlette.responses import Response

from lyra_emergence.errors import DoesNotFitError, GenerationError, LyraError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ErrorBody", "error_body", "invalid", "refusal", "status_of"]

_SERVER_ERROR: Final = 500
_LONGEST: Final = 500
"""Characters of a value or a name that an error repeats, at most."""
_KIND: Final = 4
"""Parts of a place in a body up to the kind of a message: "body", "messages", its number, the kind."""
_TYPES: Final = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})
_KINDS: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorObject


def status_of(error: Exception) -> int:
    """Return the HTTP status that an error comes to."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, DoesNotFitError):
        return 503
    return 400 if isinstance(error, GenerationError) else _SERVER_ERROR


def error_body(error: Exception) -> ErrorBody:
    """Return an error as OpenAI's clients read it; what is no error of Lyra's is told by its type alone."""
    status = status_of(error)
    kind = _KINDS.get(status, "invalid_request_error" if status < _SERVER_ERROR else "server_error")
    if not isinstance(error, LyraError):
        told = f"unexpected {type(error).__name__}"
        return _body(told, kind, "internal_error", None, "the server's own output says where")
    code = "out_of_memory" if isinstance(error, DoesNotFitError) else "invalid_value"
    param = None
    if isinstance(error, RequestError):
        code, param = error.code, error.param
    return _body(str(error), kind, code, param, error.hint)


def refusal(error: Exception) -> Response:
    """Return the response that an error comes to."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestError):
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.status == 401:  # noqa: PLR2004 - unauthorized
            headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error).model_dump_json()
    return Response(body, status_of(error), headers, "application/json")


def invalid(errors: Sequence[Mapping[str, Any]], known: frozenset[str]) -> RequestError:
    """Return what pydantic's errors about a body come to.

    Args:
        errors: As pydantic lists them.
        known: The fields that OpenAI's form of the body has.
    """
    first = _telling(errors)
    place = _place(first["loc"])
    if first["type"] == "json_invalid":
        return RequestError("the body is not valid JSON", code="invalid_json", hint="send one JSON object")
    if not place:
        return RequestError("the body is not a JSON object", hint="send one with content type application/json")
    name = place.partition(".")[0]
    if name in known and first["type"] == "extra_forbidden":
        told, code = f"'{place}' is not supported by this server", "unsupported_parameter"
    elif first["type"] == "extra_forbidden":
        told, code = f"'{place}' is not a field of such a request", "unknown_parameter"
    else:
        told, code = f"'{place}': {_lower(str(first['msg']))}", "invalid_value"
    return RequestError(told, code=code, param=place, hint="/openapi.json describes what may be sent")


def _telling(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the error that says most: where a message may be of several kinds, one of the kind that its role names.

    pydantic lists what is wrong with it as each of the kinds.
    """
    if not errors:
        return {"loc": (), "msg": "not valid", "type": ""}
    others = {error["loc"][:-1] for error in errors if error["loc"][-1:] == ("role",)}
    return next((error for error in errors if error["loc"][:_KIND] not in others), errors[0])


def _place(location: Sequence[Any]) -> str:
    """Return where in the body something is, such as "messages.0.content", without the names of types on the way."""
    parts = [part for part in location if part != "body"]
    names = [str(part) for part in parts[1:] if isinstance(part, int) or (part.isidentifier() and part.islower())]
    return ".".join([*map(str, parts[:1]), *(name for name in names if name not in _TYPES)])[:_LONGEST]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:_LONGEST]


def _body(message: str, kind: str, code: str, param: str | None, hint: str) -> ErrorBody:
    told = f"{message} ({hint})" if hint else message
    fields = {"message": _sendable(told), "type": kind, "code": code, "param": param and _sendable(param)}
    return ErrorBody(error=ErrorObject.model_validate(fields | ({"hint": hint} if hint else {})))


def _sendable(text: str) -> str:
    # Half of a surrogate pair, which JSON can write, is no UTF-8.
    return text.encode("utf-8", "replace").decode()
