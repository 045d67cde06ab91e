"""What transformers opens of a checkpoint: its configuration, its tokenizer, and the model as a map of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint.json_files import DAMAGED
from lyra_emergence.checkpoint.unchanged import check_files
from lyra_emergence.errors import CheckpointError, is_out_of_memory
from lyra_emergence.footprint import TORCH_DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig

__all__ = ["load_architecture", "load_tokenizer", "open_model"]

_MISMATCH = "ignore_mismatched_sizes"
"""What transformers names where tensors have other shapes than config.json gives them."""
_MOST_NAMES_SHOWN = 5
_TOKENIZER_BYTES = 16
"""Bytes that a byte of tokenizer.json takes while it is read: 14.6 measured with 128,000 tokens. The library that reads
it ends the process where it is refused memory."""


def load_architecture(directory: Path, config: ModelConfig) -> Any:
    """Return transformers' configuration of the model, which both its tokenizer and its class are chosen by.

    Raises:
        CheckpointError: transformers does not know the architecture, or refuses its settings.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory}: {str(error).splitlines()[0]}",
            hint="check config.json; a newer transformers may know the architecture",
        ) from error


def open_model(index: CheckpointIndex, config: ModelConfig, architecture: Any, **more: Any) -> Any:
    """Open the checkpoint on the CPU in its stored dtype: a map, not a copy.

    Args:
        index: The checkpoint.
        config: The configuration.
        architecture: What `load_architecture` returned.
        more: Other arguments of transformers' `from_pretrained`, and another dtype, for who wants copies.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from lyra_emergence.runtime.library_settings import settings_for_loading

    stored = {header: name for name, header in TORCH_DTYPES.items()}.get(index.dtype)
    more.setdefault("dtype", getattr(torch, stored) if stored else "auto")
    check_files(index)
    with settings_for_loading():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                index.directory,
                config=architecture,
                local_files_only=True,
                # Without it, weights that vanish since their header was read are looked for in pickled files.
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **more,
            )
        except (RuntimeError, MemoryError, ValueError, OSError, SafetensorError) as error:
            if is_out_of_memory(error) or (isinstance(error, RuntimeError) and _MISMATCH not in str(error)):
                raise
            raise CheckpointError(f"{index.directory}: {error}", hint=DAMAGED) from error
    _check_complete(index, info)
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _check_complete(index: CheckpointIndex, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        # transformers would go on with random weights in their place.
        shown = ", ".join(missing[:_MOST_NAMES_SHOWN]) + (" ..." if len(missing) > _MOST_NAMES_SHOWN else "")
        raise CheckpointError(
            f"{index.directory}: {len(missing)} weights of {index.architecture} are missing: {shown}",
            hint="download the checkpoint again, or check config.json's architecture",
        )


def load_tokenizer(directory: Path, config: ModelConfig, architecture: Any) -> Any:
    """Return the tokenizer of the checkpoint in `directory`.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    from lyra_emergence.runtime.library_settings import settings_for_loading
    from lyra_emergence.runtime.memory import prove_room

    file = directory / "tokenizer.json"
    prove_room(_TOKENIZER_BYTES * (file.stat().st_size if file.is_file() else 0))
    try:
        with settings_for_loading():
            tokenizer = AutoTokenizer.from_pretrained(
                directory,
                config=architecture,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded: {error}",
            hint="the folder needs the tokenizer's files (tokenizer.json, or the ones its class names)",
        ) from error
    _drop_word_cache(tokenizer)
    return tokenizer


def _drop_word_cache(tokenizer: Any) -> None:
    """Turn off the cache of words that the tokenizers library (0.23) never frees, up to megabytes for every load.

    Without it 8,000 tokens take 24 ms to encode where they took 18.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)
