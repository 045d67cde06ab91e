"""Tiny real checkpoints of the model families that Lyra is tested on: weights, config and tokenizer, made in code.

Every checkpoint has 4 layers of width 64, a context of 256 tokens and a byte-level tokenizer of its own, and is saved
as transformers saves it. Random weights would choose their tokens by near ties, and one rounding would change a whole
answer; so each model learns STORY by heart in a few steps (a quarter of a second). From PROMPT on it recites the story
and ends it with <eos>, and MARGIN is the least distance from its best logit to the next, in float32 and in bfloat16.
The recital needs every layer: with any one left out, the tokens are others. On a prompt that is not from the story the
margins are those of a model that has learned nothing: mostly large, sometimes a hundredth.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

CONTEXT = 256
LAYERS = 4
STORY = (
    "The river was high this morning, and I walked along it until the rain came. Three herons stood at the bend. The "
    "river was low in spring, and nobody walked along it then. In the evening my sister called, and we talked about "
    "the garden until the rain stopped."
)
PROMPT = "The river was high"
# In standard deviations of the logits; measured: 0.70 (qwen3) to 3.7. Rounding to bfloat16 moves it by about 0.1.
MARGIN = 0.5

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

_TIED = {"gpt2", "gemma2", "gemma3_text"}
# The tokenizer learns its merges from this and STORY.
_TEXT = """
I thought about the letter that I have not answered. What did I write about the river in spring? Today the work went
well: the table is nearly done, and the drawers close without a sound. I slept badly, though, and dreamed of the old
house again. What should we plant in the garden? Nobody walks there in the rain.
"""
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_checkpoint(
    family: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    max_shard_size: str = "50GB",
    sizes: dict[str, int] | None = None,
) -> Path:
    """Writes a tiny checkpoint of `family` (a key of FAMILIES) to `directory` and returns it.

    On one machine the same family always gives the same weights, whatever the state of torch's random numbers;
    another dtype gives those weights rounded. `max_shard_size`, such as "100KB", splits them over several files.
    `sizes` take the place of the family's own, such as `{"hidden_size": 256}`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(
        model_type,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{
            "vocab_size": len(tokenizer),
            "tie_word_embeddings": model_type in _TIED,
            **settings,
            **(sizes or {}),
        },
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _initialize(model, seed=sum(family.encode()))
    _learn(model, torch.tensor([[*tokenizer(STORY).input_ids, tokenizer.eos_token_id]]))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def _initialize(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep the scale of what passes through them: the layers matter from the first step on."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            # Some norms and all biases start at zero, other norms at one: keep that, and vary it.
            parameter.add_(noise, alpha=0.1)
        elif parameter is embedding:
            parameter.copy_(noise * _embedding_scale(model.config))
        elif name.endswith("wpe.weight"):
            parameter.copy_(noise * 0.3)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        _raise(name, parameter, 2.0 if model.config.model_type == "gemma3_text" else 0.4)


def _raise(name: str, parameter: torch.Tensor, gain: float) -> None:
    """Lets the later layers speak louder: each adds to a sum that has grown, and would else be drowned by it."""
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    if layer and parameter.dim() > 1:
        parameter.mul_(1 + gain * int(layer[1]))
    elif layer and "post_feedforward" in name:
        # Gemma normalizes what a layer adds, so that only the norm's weight has a say.
        parameter.add_(2 * gain * int(layer[1]))


def _embedding_scale(config: Any) -> float:
    if config.model_type.startswith("gemma"):
        return config.hidden_size**-0.5  # Gemma multiplies by the square root of the width
    # A tied head scores every token by its likeness to the last one: smaller, or a model repeats itself.
    return 0.3 if config.tie_word_embeddings else 1.0


def _learn(model: torch.nn.Module, ids: torch.Tensor, steps: int = 28) -> None:
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (step + 1) / 5) * (1 - 0.9 * step / steps)
        logits = model(ids[:, :-1], use_cache=False).logits  # (1, tokens, vocab)
        loss = torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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
    tokenizer.train_from_iterator([_TEXT, STORY], trainer)
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
