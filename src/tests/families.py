"""Tiny real checkpoints of the model families that Lyra is tested on: weights, config and tokenizer, made in code.

Every checkpoint has 4 layers of width 64, a context of 256 tokens and a byte-level tokenizer of its own, and is saved
as transformers saves it. The weights are random but not small: at the usual scale of an initialization the layers
hardly change what the embeddings say, and a layer that is run wrongly would go unnoticed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

CONTEXT = 256
LAYERS = 4
PROMPT = "The river was high this morning, and I walked along it"

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Family: (model type of transformers, its settings).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama-tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "phi": ("phi", {**_SHAPE, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 16}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}),
    "gpt-neox": ("gpt_neox", _SHAPE),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "qwen2-moe": (
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
}

_TEXT = """
The river was high this morning and I walked along it until the rain came. There were three herons at the bend, and
one of them stood in the water as if it had been put there. I thought about the letter that I have not answered.
What did I write about the river in spring? In spring I wrote that it was low and brown, and that nobody walked there.
Today the work went well: the table is nearly done, and the drawers close without a sound. I slept badly, though, and
dreamed of the old house again. My sister called in the evening; we talked about the garden and about what to plant.
"""
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_checkpoint(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a tiny checkpoint of `family` (a key of FAMILIES) to `directory` and returns it.

    The same family always gives the same weights, whatever the state of torch's random numbers; another dtype gives
    those weights rounded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": False} | _tied_by_nature(model_type) | settings,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _fill(model, seed=sum(family.encode()))
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tied_by_nature(model_type: str) -> dict[str, bool]:
    return {"tie_word_embeddings": True} if model_type in {"gpt2", "gemma2", "gemma3_text"} else {}


@torch.no_grad()
def _fill(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep the scale of what passes through them; norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            # Gemma's norms and all biases start at zero, every other norm at one: keep that, and vary it.
            parameter.add_(noise, alpha=0.1)
        elif "embed" in name or "wte" in name or "wpe" in name or "head" in name or "embed_out" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens: any text goes in and comes out unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
