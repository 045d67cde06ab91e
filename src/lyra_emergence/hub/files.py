"""Which files of a model repository a load needs, and whether a folder has them all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lyra_emergence.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_weight_map
from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["has_weights", "is_vocabulary", "select_files"]

# What a tokenizer is built from: one of these makes it complete enough to try.
_VOCABULARY = re.compile(
    r"tokenizer\.json|vocab\.(json|txt|bpe)|[\w\-]*vocab[\w\-]*\.(json|txt)|tekken\.json|[\w.\-]+\.(model|tiktoken)"
)
_SETTINGS = re.compile(
    r"(generation_config|tokenizer_config|special_tokens_map|added_tokens|chat_template|preprocessor_config)\.json"
    r"|merges\.txt|[\w.\-]+\.jinja|additional_chat_templates/[\w.\-]+\.jinja"
    # Code of the model's own, which transformers runs only where `trust_remote_code` says so.
    r"|[\w\-]+\.py"
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_vocabulary(file: str) -> bool:
    """Return whether a tokenizer can be built from `file`."""
    return _VOCABULARY.fullmatch(file) is not None


def select_files(files: Iterable[str]) -> tuple[str, ...]:
    """Return those of a repository's `files` that a load reads, the weights last.

    Weights are `model.safetensors` where there is one, else the index and its shards, in transformers' order of
    precedence; never the same weights in another form (.bin, ONNX, GGUF, consolidated.safetensors). Empty
    where the repository has no safetensors weights in transformers' form.
    """
    names = set(files)
    weights = _weights(names)
    if not weights:
        return ()
    small = {name for name in names if name == CONFIG_FILE or is_vocabulary(name) or _SETTINGS.fullmatch(name)}
    return (*sorted(small, key=lambda name: (name != CONFIG_FILE, name)), *weights)


def _weights(names: set[str]) -> list[str]:
    if WEIGHTS_FILE in names:
        return [WEIGHTS_FILE]
    if INDEX_FILE not in names:
        return []
    shards = [name for name in names if _SHARD.fullmatch(name)]
    return [INDEX_FILE, *sorted(shards)]


def has_weights(folder: Path) -> bool:
    """Return whether `folder` holds whole weights: one file, or every shard that its index names.

    Pickled weights count, so that what is there already is refused with its remedy instead of being downloaded again.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return True
    if (folder / INDEX_FILE).is_file():
        try:
            shards = set(read_weight_map(folder / INDEX_FILE).values())
        except CheckpointError:
            return False
        return all((folder / shard).is_file() for shard in shards)
    return any((folder / name).is_file() for name in _PICKLED_WEIGHTS)
