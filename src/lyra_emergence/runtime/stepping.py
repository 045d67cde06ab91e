"""How a model is fed: how much of a prompt at once, and for which tokens it makes logits."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

__all__ = ["Feeding", "caches_of", "feeding_of"]

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True, slots=True)
class Feeding:
    """How a model takes its tokens.

    Attributes:
        chunk: Tokens of a prompt that run at once; None where they all must.
        arguments: What to pass so that only the last token's logits are made; {} where the model cannot.
    """

    chunk: int | None
    arguments: dict[str, int]


def feeding_of(model: Any, chunk: int) -> Feeding:
    """Return how `model`, a causal language model of transformers, is fed.

    A recurrent state takes its first run of tokens whole and single tokens after it.
    """
    takes = inspect.signature(model.forward).parameters
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    recurrent = bool(getattr(model, "_is_stateful", False)) or not kinds <= _ATTENTION_LAYERS
    return Feeding(None if recurrent else chunk, {"logits_to_keep": 1} if "logits_to_keep" in takes else {})


def caches_of(output: Any) -> dict[str, Any]:
    """Return the caches in a forward pass's output, as the next pass takes them; {} where the model has none."""
    return {name: output[name] for name in _CACHES if output.get(name) is not None}
