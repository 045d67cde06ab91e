"""Every error that Lyra raises on purpose, and what counts as out of memory.

    LyraError                     message, and a hint that says what to do
    ├── ConfigError               a configuration file, environment variable or option is wrong (exit code 2)
    ├── DoesNotFitError           the model cannot be placed in the memory given (exit code 3)
    ├── CheckpointError           checkpoint files are missing, malformed or unsupported
    ├── ModelUnavailableError     a model id is neither on disk nor reachable
    ├── MissingExtraError         an optional dependency is not installed
    ├── GenerationError           a request cannot be run (an empty prompt, a prompt beyond the context)
    ├── JournalError              a journal file is missing or holds no valid entry
    ├── EndpointError             a server cannot be reached, refuses, or does not answer as it should
    ├── ConversationError         a conversation cannot be read, found or kept
    ├── RequestError              the server of `lyra.py serve` refuses a request (HTTP status)
    └── AbandonedError            an answer that nobody waits for any more was stopped

Foreign exceptions are recognized as out of memory in one place, `is_out_of_memory`: by type wherever the library has
one, by message only where torch raises a bare RuntimeError, or where transformers hides the error in a text.
"""

from __future__ import annotations

import errno
import re
import sys
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "AbandonedError",
    "CheckpointError",
    "ConfigError",
    "ConversationError",
    "DoesNotFitError",
    "EndpointError",
    "GenerationError",
    "JournalError",
    "LyraError",
    "MissingExtraError",
    "ModelUnavailableError",
    "RequestError",
    "is_out_of_memory",
    "lacks_reason",
    "lost_onednn",
    "without_frames",
]

_OUT_OF_MEMORY_MESSAGES = (
    # torch raises these as bare RuntimeErrors: the allocator of the CPU (Linux, Windows), MPS, error codes of CUDA and
    # HIP that reached us outside the caching allocator, XPU, workspaces of the math libraries, and C++ operator new.
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "mps backend out of memory",
    "invalid buffer size: ",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
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
    "cusolver_status_alloc_failed",
    "cufft_alloc_failed",
    # What torch adds to cuDNN's own text where its kernels find no memory outside the caching allocator.
    "cuda ran out of memory outside pytorch's allocator",
    # Triton's drivers for CUDA and HIP. Its "out of resource: shared memory" is about a kernel's shape: no such case.
    "triton error [cuda]: out of memory",
    "triton error [hip]: out of memory",
    "std::bad_alloc",
)
_NO_PRIMITIVE = "could not create a primitive"
"""All that oneDNN says, as the whole text, where it cannot get memory for the code of a kernel.

It says so for other reasons too (a system that forbids writable code, a defect), for all of which the remedy is the
same: `lost_onednn`. A kernel that it does not have is "could not create a primitive descriptor ...", and no such case.
"""
_UNABLE_TO_MMAP = "unable to mmap"
_NO_MEMORY_TO_MMAP = "cannot allocate memory"
_NO_REASON = re.compile("returned NULL without setting an exception|error return without exception set")
"""What the interpreter says where code in C failed and did not say why."""
_ALLOCATION_CODE = 2
"""cudaErrorMemoryAllocation, and hipErrorOutOfMemory."""
_MAX_CAUSES = 16

_CONVERSION_FAILED = "We encountered some issues during automatic conversion of the weights"
_PIPELINE_FAILED = "Could not load model "
_RAISED = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
"""The line that ends a printed traceback; the lines of its frames are indented."""


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
        needed: Bytes that the placement needs; 0 where memory ran out before that was known.
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


class EndpointError(LyraError):
    """A server that answers in place of a model cannot be reached, refuses, or does not answer as it should."""


class ConversationError(LyraError):
    """A conversation cannot be read, found or kept."""


class RequestError(LyraError):
    """Our server refuses a request.

    Attributes:
        status: The HTTP status.
        code: What it is, in OpenAI's words where there are any, such as "context_length_exceeded".
        param: The field of the request that is wrong, or None.
        retry_after: Seconds after which it is worth asking again; None where it is not.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        retry_after: int | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


class AbandonedError(LyraError):
    """An answer was stopped because nobody waits for it any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, or an error that caused it, means that memory ran out.

    A device-side assert, an index error, a missing file or a Ctrl-C is never out of memory, whatever its text.

    Two errors of transformers hide what happened: a failed conversion of weights (quantization, merged experts) keeps
    the original's text in the frame that raised it, so ask before the traceback is cut; a pipeline that could not
    load a model by its id prints the original tracebacks into its message.
    """
    current: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if not isinstance(current, Exception) or _has_broken_the_device(current):
            return False
        if _is_itself_out_of_memory(current):
            return True
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return False


def lacks_reason(error: BaseException) -> bool:
    """Return whether code in C failed without saying why, which the interpreter reports as a SystemError.

    CPython does so itself where it is refused memory in some places (seen with 3.11, reading attributes of a
    configuration), but a defect of an extension looks the same. So it is no lack of memory, and worth one more try.
    """
    return isinstance(error, SystemError) and _NO_REASON.search(str(error)) is not None


def lost_onednn(error: BaseException) -> bool:
    """Return whether oneDNN could not make a kernel's code.

    The thread that it happened in cannot make another one for the rest of its life, and attention in half precision
    then crashes the process (seen with torch 2.15 and a limit of address space): oneDNN must be turned off.
    """
    return isinstance(error, RuntimeError) and str(error) == _NO_PRIMITIVE


def _has_broken_the_device(error: Exception) -> bool:
    """Return whether a GPU reported an error other than lack of memory: its context is lost, a retry is no remedy."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "AcceleratorError", None)
    return kind is not None and isinstance(error, kind) and not _is_itself_out_of_memory(error)


def _is_itself_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    if isinstance(error, ValueError):
        return text.startswith(_PIPELINE_FAILED) and _prints_out_of_memory(text)
    return isinstance(error, RuntimeError) and _tells_out_of_memory(error, text)


def _tells_out_of_memory(error: RuntimeError, text: str) -> bool:
    if text.startswith(_CONVERSION_FAILED):
        return any(_prints_out_of_memory(found) for found in _conversion_errors(error))
    return getattr(error, "error_code", None) == _ALLOCATION_CODE or _says_out_of_memory(text)


def _says_out_of_memory(text: str) -> bool:
    text = text.lower()
    if _UNABLE_TO_MMAP in text:
        return _NO_MEMORY_TO_MMAP in text
    return text == _NO_PRIMITIVE or any(message in text for message in _OUT_OF_MEMORY_MESSAGES)


def _prints_out_of_memory(text: str) -> bool:
    """Return whether a text with printed tracebacks has an out-of-memory error in it."""
    return any(_ends_out_of_memory(match) for line in text.splitlines() if (match := _RAISED.match(line)))


def _ends_out_of_memory(raised: re.Match[str]) -> bool:
    name = raised["type"].rpartition(".")[2]
    if name in ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError"):
        return True
    # A conversion without details prints its step in place of the type: "Concatenate: CUDA out of memory. Tried ..."
    foreign = name.endswith("Error") and name not in ("RuntimeError", "AcceleratorError")
    return not foreign and _says_out_of_memory(raised["message"] or "")


def _conversion_errors(error: Exception) -> Iterator[str]:
    """Yield the texts of the failed conversions, which transformers keeps in the frame that raised `error`."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    info = step.tb_frame.f_locals.get("loading_info") if step is not None else None
    found = getattr(info, "conversion_errors", None)
    yield from (text for text in found.values() if isinstance(text, str)) if isinstance(found, dict) else ()


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
