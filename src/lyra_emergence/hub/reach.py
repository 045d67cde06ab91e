"""Whether the hub answers at all."""

from __future__ import annotations

import time

from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.hub.errors import UNREACHABLE_HINT

__all__ = ["reach"]


def reach(timeout: float = 3.0) -> tuple[str, float]:
    """Ask the hub for its front page's head; return its address and the seconds that its answer took.

    Args:
        timeout: Seconds until it counts as unreachable.

    Raises:
        ModelUnavailableError: It is unreachable, or the network is forbidden (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise ModelUnavailableError(
            "HF_HUB_OFFLINE forbids to ask it", hint="unset HF_HUB_OFFLINE to look up and download models"
        )
    import httpx

    from lyra_emergence.hub import within

    began = time.perf_counter()
    try:
        within(timeout, lambda: httpx.head(constants.ENDPOINT, timeout=timeout))
    except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        reason = str(error).rpartition("] ")[2] or f"no answer within {timeout:g} s"
        raise ModelUnavailableError(
            f"{constants.ENDPOINT} cannot be reached: {reason}", hint=f"{UNREACHABLE_HINT}; models here work without it"
        ) from error
    return constants.ENDPOINT, time.perf_counter() - began
