"""What a run begins with: whether the network may be asked, and what answers."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.ready import Ready

__all__ = ["go_offline", "settle"]


def settle(options: Options, console: Console) -> Ready:
    """Settle everything that can go wrong before the model is loaded, or its server asked.

    Raises:
        LyraError: Something is wrong; see its type.
    """
    if options.offline:
        go_offline()
    if options.endpoint is not None:
        from lyra_emergence.cli.served import prepare_endpoint

        return prepare_endpoint(options.endpoint, options, console)
    from lyra_emergence.cli.prepare import prepare

    return prepare(options, console)


def go_offline() -> None:
    """Ask no hub in this process, nor in those that it starts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
