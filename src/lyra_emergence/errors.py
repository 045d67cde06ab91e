"""Every error that Lyra raises on purpose, and what counts as out of memory.

    LyraError                     message, and a hint that says what to do
    ├── ConfigError               a configuration file, environment variable or option is wrong (exit code 2)
    ├── DoesNotFitError           the model cannot be placed in the memory given (exit code 3)
    ├── CheckpointError           checkpoint files are missing, malformed or unsupported
    ├── ModelUnavailableError     a model id is neither on disk nor reachable
    ├── MissingExtraError         an optional dependency is not installed
    ├── GenerationError           a request cannot be run (an empty prompt, a prompt beyond the context)
    └── JournalError              a journal file is missing or holds no valid entry

Foreign exceptions are recognised as out of memory in one place, `is_out_of_memory`: by type wherever the library
has one, by message only where torch raises a bare RuntimeError.
"""

from __future__ import annotations

import sys
from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DoesNotFitError",
    "GenerationError",
    "JournalError",
    "LyraError",
    "MissingExtraError",
    "ModelUnavailableError",
    "is_out_of_memory",
    "without_frames",
]

_OUT_OF_MEMORY_MESSAGES = (
    # torch raises these as bare RuntimeErrors: the allocator of the CPU (Linux, Windows), MPS, a CUDA error code
    # that reached us outside the caching allocator, XPU, cuBLAS and cuDNN workspaces, and C++ operator new.
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "[enforce fail at alloc_cpu",
    "mps backend out of memory",
    "invalid buffer size",
    "cuda error: out of memory",
    "hip error: out of memory",
    "cuda out of memory",
    "hip out of memory",
    "xpu out of memory",
    "ur_result_error_out_of_device_memory",
    "ur_result_error_out_of_host_memory",
    "ur_result_error_out_of_resources",
    "cublas_status_alloc_failed",
    "hipblas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "std::bad_alloc",
    "unable to mmap",
)
_UNABLE_TO_MMAP_IS_MEMORY = "cannot allocate memory"
_MAX_CAUSES = 16


class LyraError(Exception):
    """An error with a remedy.

    Attributes:
        hint: What the reader can do about it; empty where the message already says so.
        exit_code: The program's exit status when this error ends it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LyraError, ValueError):
    """Wrong configuration; the message lists every problem, a line each.

    Attributes:
        problems: One line per problem, each naming the key path and the remedy.
    """

    exit_code = 2

    def __init__(self, message: str, *, problems: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__("\n".join((message, *(f"  {problem}" for problem in problems))), hint=hint)
        self.problems = problems


class DoesNotFitError(LyraError, MemoryError):
    """The model does not fit the memory it may use.

    Attributes:
        needed: Bytes that the placement needs.
        available: Bytes that it may use.
        device: The device that falls short, such as "cuda:0" or "cpu"; empty where all do together.
    """

    exit_code = 3

    def __init__(self, message: str, *, needed: int, available: int, device: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.available = available
        self.device = device


class CheckpointError(LyraError):
    """Checkpoint files are missing, malformed or of a kind that Lyra does not read."""


class ModelUnavailableError(LyraError):
    """A model id is neither a folder, nor in the cache, nor reachable on the hub."""


class MissingExtraError(LyraError, ImportError):
    """An optional dependency is missing.

    Attributes:
        extra: The extra that brings it, such as "quant".
    """

    def __init__(self, what: str, *, extra: str) -> None:
        super().__init__(
            f"{what} needs the extra '{extra}', which is not installed",
            hint=f"run: pip install 'lyra-emergence[{extra}]'   (in a checkout: uv sync --extra {extra})",
        )
        self.extra = extra


class GenerationError(LyraError):
    """A request cannot be run as asked."""


class JournalError(LyraError):
    """A journal cannot be read, or holds no valid entry."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, or an error that caused it, means that memory ran out.

    A device-side assert, an index error, a missing file or a Ctrl-C is never out of memory, whatever its text.
    """
    seen = 0
    current: BaseException | None = error
    while current is not None and seen < _MAX_CAUSES:
        if _is_itself_out_of_memory(current):
            return True
        seen += 1
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return False


def _is_itself_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    if "unable to mmap" in text:
        return _UNABLE_TO_MMAP_IS_MEMORY in text
    return any(message in text for message in _OUT_OF_MEMORY_MESSAGES)


def without_frames(error: BaseException) -> BaseException:
    """Cut the tracebacks of an error and of what led to it, and return it.

    Their frames hold the tensors of the step that failed, for as long as anyone holds the error.
    """
    current: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if current is None:
            break
        current.__traceback__ = None
        current = current.__cause__ or current.__context__
    return error
