"""The documented loading functions at their documented path.

They are the library's; here each step of loading is logged under this module's name, so that
`logging.getLogger("src.utils.device_fallback").setLevel(logging.DEBUG)` shows every fallback.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from lyra_emergence import device_fallback as _library

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from langchain_huggingface import HuggingFaceEmbeddings, HuggingFacePipeline

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.langchain import LyraPipeline

__all__ = [
    "safe_load_embeddings",
    "safe_load_model",
    "safe_load_model_with_config",
    "safe_load_pipeline",
    "safe_load_pipeline_legacy",
]

T = TypeVar("T")

logger = logging.getLogger(__name__)
_log = _library.log_events(logger)


def safe_load_pipeline(model_id: str, task: str, config_path: str | Path | None = None, **kwargs: Any) -> LyraPipeline:
    """Load a model for LangChain as a configuration file says; see `lyra_emergence.safe_load_pipeline`."""
    return _library.safe_load_pipeline(model_id, task, config_path, on_event=_log, **kwargs)


def safe_load_model_with_config(
    model_loader: Callable[..., T], config: ModelConfig | None = None, *args: Any, **kwargs: Any
) -> T:
    """Load with any loader and with fallback; see `lyra_emergence.safe_load_model_with_config`."""
    return _library.safe_load_model_with_config(model_loader, config, *args, on_event=_log, **kwargs)


def safe_load_model(model_loader: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a loader, and once more on the CPU if memory runs out; see `lyra_emergence.safe_load_model`."""
    return _library.safe_load_model(model_loader, *args, on_event=_log, **kwargs)


def safe_load_pipeline_legacy(model_id: str, task: str, **kwargs: Any) -> HuggingFacePipeline:
    """Load LangChain's own pipeline without a plan; see `lyra_emergence.safe_load_pipeline_legacy`."""
    return _library.safe_load_pipeline_legacy(model_id, task, on_event=_log, **kwargs)


def safe_load_embeddings(**kwargs: Any) -> HuggingFaceEmbeddings:
    """Load LangChain's embeddings, on the CPU if memory runs out; see `lyra_emergence.safe_load_embeddings`."""
    return _library.safe_load_embeddings(on_event=_log, **kwargs)
