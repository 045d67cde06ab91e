"""transformers' process-wide settings while Lyra opens a model or a tokenizer, by one thread at a time.

Progress bars and advice stay off the terminal: the caller shows its own progress. transformers' loader threads stay
off: nothing is read while the checkpoint is mapped, merged experts take less memory one after the other, threads go on
loading after memory ran out, and where a thread's first piece of memory is refused Python waits for it for good.

transformers also patches torch and itself while it builds a model (initialization, tying). Two threads that do so at
once break each other: tied weights were told missing. Copying to devices comes later, and needs no turns.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["settings_for_loading"]

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
_turn = threading.Lock()


@contextmanager
def settings_for_loading() -> Iterator[None]:
    """Hold transformers' settings for loading within this context; another thread waits until it ends."""
    from transformers.utils import logging as hf_logging

    with _turn:
        bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
        no_threads = os.environ.get(_NO_THREADS)
        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()
        os.environ[_NO_THREADS] = "1"
        try:
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()
            if no_threads is None:
                os.environ.pop(_NO_THREADS, None)
            else:
                os.environ[_NO_THREADS] = no_threads
