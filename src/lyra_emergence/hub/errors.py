"""What went wrong between us and the hub, told apart and each with its remedy.

Foreign errors are recognised by type, and where huggingface_hub has no type of its own by the answer's status code.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from lyra_emergence.errors import ModelUnavailableError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["UNREACHABLE_HINT", "gated", "offline", "unavailable"]

UNREACHABLE_HINT = "check the connection, or give the folder of a checkpoint on this machine"
_RESUME_HINT = "run it again: files that are complete are kept"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SERVER_ERROR = 500
_FORBIDDEN = 403
_NOT_FOUND = 404
_UNAUTHORIZED = 401
_RATE_LIMITED = 429

_ERROR_NUMBER = re.compile(r"^\[Errno -?\d+\] ")
"""What the operating system puts before its message; it tells a person nothing."""


def unavailable(model_id: str, error: BaseException, *, file: str = "") -> ModelUnavailableError:
    """Return what `error` means for `model_id`.

    Args:
        model_id: The model that was looked up or downloaded.
        error: What huggingface_hub, httpx or the file system raised.
        file: The file that was being downloaded; empty for a look-up.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        # huggingface_hub found no copy in the cache either; why it asked for one is the cause.
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return offline(model_id)
    if isinstance(error, HfHubHTTPError):
        return _refused(model_id, error)
    if isinstance(error, httpx.HTTPError):
        return _unreachable(model_id, error, file)
    if isinstance(error, OSError) and error.errno is not None:
        return _not_written(model_id, error)
    if file:
        return ModelUnavailableError(f"the download of {file} of {model_id} failed: {_said(error)}", hint=_RESUME_HINT)
    return ModelUnavailableError(
        f"{_endpoint()} did not answer as a hub does, when asked for {model_id}",
        hint="check HF_ENDPOINT, the proxy and whether this network asks for a login",
    )


def offline(model_id: str) -> ModelUnavailableError:
    """Return the error for a model that would have to be asked for in offline mode."""
    return ModelUnavailableError(
        f"{model_id} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub",
        hint="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or give the folder of a checkpoint on this machine",
    )


def gated(model_id: str) -> ModelUnavailableError:
    """Return the error for a model whose license was not accepted, or not by whom the token belongs to."""
    return ModelUnavailableError(
        f"{model_id} is gated: its license must be accepted before it can be downloaded",
        hint=f"accept the license at {_endpoint()}/{model_id}, then run: hf auth login",
    )


def _refused(model_id: str, error: HfHubHTTPError) -> ModelUnavailableError:
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return gated(model_id)
    if isinstance(error, DisabledRepoError):
        return ModelUnavailableError(f"the hub has disabled {model_id}", hint="choose another model")
    if isinstance(error, RevisionNotFoundError):
        return ModelUnavailableError(f"{model_id} has no such revision", hint="check the revision's name")
    if isinstance(error, RemoteEntryNotFoundError):
        return ModelUnavailableError(f"{model_id} has lost a file since it was looked up", hint="run it again")
    if isinstance(error, RepositoryNotFoundError) or status in (_NOT_FOUND, _UNAUTHORIZED):
        return ModelUnavailableError(
            f"the hub has no model {model_id}, or none for you to see",
            hint="check the spelling; for a private model run: hf auth login",
        )
    return _refused_by_status(model_id, status, error.response.headers.get("Retry-After", ""))


def _refused_by_status(model_id: str, status: int, retry_after: str) -> ModelUnavailableError:
    if status == _FORBIDDEN:
        return ModelUnavailableError(
            f"the hub forbids access to {model_id}", hint="run `hf auth login` with a token that may read it"
        )
    if status == _RATE_LIMITED:
        wait = f"wait {retry_after} seconds" if retry_after.isdigit() else "wait some minutes"
        return ModelUnavailableError(
            f"the hub answers no more requests from here for now, asked for {model_id}",
            hint=f"{wait}, or run `hf auth login` for a higher limit",
        )
    if status >= _SERVER_ERROR:
        return ModelUnavailableError(
            f"the hub failed when asked for {model_id} (HTTP {status})", hint="try again later"
        )
    return ModelUnavailableError(f"the hub refused to serve {model_id} (HTTP {status})", hint=UNREACHABLE_HINT)


def _unreachable(model_id: str, error: BaseException, file: str) -> ModelUnavailableError:
    if file:
        return ModelUnavailableError(
            f"the connection broke while {file} of {model_id} was downloaded: {_said(error)}", hint=_RESUME_HINT
        )
    return ModelUnavailableError(
        f"{model_id} is not on this machine, and {_endpoint()} cannot be reached: {_said(error)}", hint=UNREACHABLE_HINT
    )


def _not_written(model_id: str, error: OSError) -> ModelUnavailableError:
    from huggingface_hub import constants

    if error.errno in _NO_ROOM:
        return ModelUnavailableError(
            f"the disk is full: {model_id} cannot be stored in {constants.HF_HUB_CACHE}",
            hint="free some space, or set HF_HOME to a folder on a larger disk; files that are complete are kept",
        )
    return ModelUnavailableError(
        f"{model_id} cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}",
        hint="set HF_HOME to a folder that you may write to",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _said(error: BaseException) -> str:
    return _ERROR_NUMBER.sub("", str(error).partition("\n")[0]) or type(error).__name__
