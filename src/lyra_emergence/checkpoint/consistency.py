"""Whether config.json describes a causal model, and sizes that are those of the tensors.

Sizes are compared for model types of which the shapes are known to follow from config.json, where it states them: a
default of transformers is taken for none. Packed weights have shapes of their own and are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint.architecture import language_config, whole_number
from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lyra_emergence.checkpoint.blocks import Block
    from lyra_emergence.checkpoint.safetensors_header import TensorInfo

__all__ = ["CHECKED_TYPES", "check_kind", "check_sizes"]

CHECKED_TYPES = frozenset(
    """
    cohere cohere2 gemma gemma2 gemma3_text glm4 gpt2 gpt_neox granite llama mistral mixtral olmo olmo2 olmo3 olmoe opt
    phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 starcoder2
    """.split()  # noqa: SIM905 - a table of words reads better than quoted strings
)
"""Model types of transformers 5.23 whose tensors have the shapes that this module expects."""

_KEYS_BY_TYPE = {
    "gpt2": {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_attention_heads": "n_head"},
    "opt": {"intermediate_size": "ffn_dim"},
    "mixtral": {"num_experts": "num_local_experts"},
}
"""What a type calls a size where it has a name of its own: any other name may stand in config.json, and is not read."""
_OWN_HEAD_WIDTH = frozenset({"gemma", "gemma2", "gemma3_text", "glm4", "qwen3", "qwen3_moe"})
"""Types whose heads have a width of their own where config.json does not state it."""
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MATRIX = 2
_HINT = "take a causal language model, whose architecture is called ...ForCausalLM"

_INPUTS = re.compile(
    r"(?:self_attn\.(?:[qkv]|qkv)_proj|query_key_value|mlp\.(?:gate|up|gate_up)_proj|c_fc|fc1|dense_h_to_4h)\.weight$"
)
_QUERIES = re.compile(r"self_attn\.q_proj\.weight$")
_KEYS = re.compile(r"self_attn\.[kv]_proj\.weight$")
_INNER_ROWS = re.compile(r"(?<!expert)\.(?:mlp\.(?:gate|up)_proj|mlp\.c_fc|mlp\.fc1|fc1|dense_h_to_4h)\.weight$")
_ROUTER = re.compile(r"(?:mlp|block_sparse_moe)\.gate\.weight$")


@dataclass(frozen=True, slots=True)
class _Size:
    """A size that config.json states: its key and value, and what the tensors hold instead."""

    key: str
    value: int
    tensor: TensorInfo
    axis: int
    unit: int = 1

    def contradicts(self) -> bool:
        return self.tensor.shape[self.axis] != self.value * self.unit

    def told(self) -> str:
        means = f", heads of {self.unit} and so {self.value * self.unit} rows" if self.unit > 1 else ""
        return (
            f"'{self.key}' is {self.value}{means}, but tensor '{self.tensor.name}' has shape {list(self.tensor.shape)}"
        )


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """Check that config.json describes a model that continues text.

    Raises:
        CheckpointError: It describes one with an encoder of its own, or one that fills gaps.
    """
    names = config.get("architectures")
    named = f" ({names[0]})" if isinstance(names, list) and names and isinstance(names[0], str) else ""
    text = language_config(config)
    if config.get("is_encoder_decoder") is True:
        raise CheckpointError(f"{where}: an encoder and a decoder{named}, where Lyra runs decoders alone", hint=_HINT)
    if named.endswith("ForMaskedLM)") and text.get("is_decoder") is not True:
        raise CheckpointError(
            f"{where}: a model that fills gaps in a text{named}, not one that continues it", hint=_HINT
        )


def check_sizes(
    tensors: Mapping[str, TensorInfo], blocks: Iterable[Block], config: Mapping[str, Any], where: str
) -> None:
    """Compare the sizes in config.json with the shapes of the tensors.

    Args:
        tensors: Every tensor of the checkpoint.
        blocks: Its blocks.
        config: The parsed config.json.
        where: The checkpoint's folder; it begins the message.

    Raises:
        CheckpointError: A size is not that of the tensors; the message names both.
    """
    text = language_config(config)
    if str(text.get("model_type")) not in CHECKED_TYPES or "quantization_config" in config:
        return
    matrices = (
        (block.kind, tensor)
        for block in blocks
        if block.kind in ("embedding", "layer")
        for tensor in (tensors[name] for name in block.tensors)
        if len(tensor.shape) == _MATRIX and tensor.dtype in _FLOATS
    )
    for kind, tensor in matrices:
        sizes = _of_embedding(tensor, text) if kind == "embedding" else _of_layer(tensor, text)
        wrong = next((size for size in sizes if size.contradicts()), None)
        if wrong is not None:
            raise CheckpointError(
                f"{where}/config.json: {wrong.told()}",
                hint="config.json and the weights must come from the same checkpoint",
            )


def _of_embedding(tensor: TensorInfo, config: Mapping[str, Any]) -> Iterator[_Size]:
    if not tensor.name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
        return  # a table of positions
    yield from _stated(config, "vocab_size", tensor, 0)
    if "word_embed_proj_dim" not in config:
        yield from _stated(config, "hidden_size", tensor, 1)


def _of_layer(tensor: TensorInfo, config: Mapping[str, Any]) -> Iterator[_Size]:
    name, transposed = tensor.name, config.get("model_type") == "gpt2"
    if _INPUTS.search(name):
        yield from _stated(config, "hidden_size", tensor, 0 if transposed else 1)
    if _INNER_ROWS.search(name):
        yield from _stated(config, "intermediate_size", tensor, 1 if transposed else 0)
    if _ROUTER.search(name):
        yield from _stated(config, "num_experts", tensor, 0)
    width = _head_width(config)
    if width and _QUERIES.search(name):
        yield from _stated(config, "num_attention_heads", tensor, 0, width)
    if width and _KEYS.search(name):
        yield from _stated(config, "num_key_value_heads", tensor, 0, width)


def _stated(config: Mapping[str, Any], size: str, tensor: TensorInfo, axis: int, unit: int = 1) -> Iterator[_Size]:
    key = _key(config, size)
    value = whole_number(config, key)
    if value is not None:
        yield _Size(key, value, tensor, axis, unit)


def _key(config: Mapping[str, Any], size: str) -> str:
    return _KEYS_BY_TYPE.get(str(config.get("model_type")), {}).get(size, size)


def _head_width(config: Mapping[str, Any]) -> int | None:
    """Return a head's width as config.json states it, else its share of the hidden size where the type has no own."""
    stated = whole_number(config, "head_dim")
    hidden, heads = (whole_number(config, _key(config, size)) for size in ("hidden_size", "num_attention_heads"))
    if stated or hidden is None or heads is None or str(config.get("model_type")) in _OWN_HEAD_WIDTH:
        return stated
    return hidden // heads
