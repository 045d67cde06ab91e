"""What config.json says about a language model, under the many names that architectures use for the same thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint.json_files import shown
from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "TIED_BY_DEFAULT",
    "context_length",
    "language_config",
    "prediction_layers",
    "stated_layers",
    "ties_embeddings",
    "usual_head",
    "whole_number",
]

# Where multimodal configurations keep the part of the language model.
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
    "decoder_layers",
)
_CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
)
# Layers for predicting several tokens at once, numbered behind the model's own; transformers leaves them unloaded.
_PREDICTION_LAYERS = "num_nextn_predict_layers"

# Decoders of transformers 5.23 that call a tied head, of which nothing may be stored, anything else than `lm_head`.
_HEADS = {"biogpt": "output_projection", "trocr": "output_projection", "gpt_neox_japanese": "embed_out"}

TIED_BY_DEFAULT = frozenset(
    """
    bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere
    cohere2 cohere2_moe cohere_compass_text cpmant ctrl data2vec-text electra ernie ernie4_5 ernie4_5_moe falcon
    falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text
    gemma4_unified gemma4_unified_assistant gemma4_unified_text got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox_japanese granite_swa jetmoe lfm2 lfm2_moe lfm3 mamba marian mbart megatron-bert minicpm3
    modernbert-decoder moss_transcribe_diarize mpt mvp openai-gpt opt pegasus plbart prophetnet recurrent_gemma
    roberta roberta-prelayernorm roc_bert roformer smollm3 starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905 - a table of words reads better than a hundred quoted strings
)
"""Model types whose class in transformers 5.23 ties by default: what counts where config.json is silent.

transformers 5 always writes the key. Older versions left it out where it was True, the default of that time.
"""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config.json; what it leaves out is looked up in the whole."""
    for key in _LANGUAGE_PARTS:
        part = config.get(key)
        if isinstance(part, dict):
            return {**{name: value for name, value in config.items() if name != key}, **part}
    return config


def usual_head(config: Mapping[str, Any]) -> str:
    """Return what transformers calls the head of this model type, for a head of which nothing is stored."""
    return _HEADS.get(str(language_config(config).get("model_type")), "lm_head")


def whole_number(config: Mapping[str, Any], key: str) -> int | None:
    """Return `config[key]` where it is a whole number above 0, else None."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence in tokens that the model was made for, or None where config.json does not say.

    A `rope_scaling` factor is not applied on top: to transformers `max_position_embeddings` is the extended length, and
    the factor is its ratio to `original_max_position_embeddings` where config.json gives none.
    """
    text = language_config(config)
    found = (whole_number(text, key) for key in _CONTEXT_LENGTHS)
    return next((length for length in found if length is not None), None)


def stated_layers(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return each layer count that config.json states, by its key; usually one.

    Raises:
        CheckpointError: A count is no whole number above 0; `where` begins the message.
    """
    text = language_config(config)
    found: dict[str, int] = {}
    for key in _LAYER_COUNTS:
        if text.get(key) is None:
            continue
        count = whole_number(text, key)
        if count is None:
            raise CheckpointError(
                f"{where}: '{key}' is {shown(text[key])}, not a whole number above 0",
                hint="config.json and the weights must come from the same checkpoint",
            )
        found[key] = count
    return found


def prediction_layers(config: Mapping[str, Any]) -> int:
    """Return how many layers behind the model's own are stored for multi-token prediction."""
    return whole_number(language_config(config), _PREDICTION_LAYERS) or 0


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Return whether the head shares the embedding's weight; None where neither config.json nor the type says.

    transformers 5 forwards a True in the language model's part to the whole, so either one ties.
    """
    parts = [config, *(config[key] for key in _LANGUAGE_PARTS if isinstance(config.get(key), dict))]
    said = [part["tie_word_embeddings"] for part in parts if isinstance(part.get("tie_word_embeddings"), bool)]
    if said:
        return any(said)
    if any(part.get("model_type") in TIED_BY_DEFAULT for part in parts if isinstance(part.get("model_type"), str)):
        return True
    return None
