"""The tiny checkpoints are what other tests take them for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .families import FAMILIES, LAYERS, MARGIN, PROMPT, STORY, build_checkpoint, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def recite(model: Any, new_tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens after PROMPT, and the margins of their logits in standard deviations."""
    ids = make_tokenizer()(PROMPT, return_tensors="pt").input_ids
    out = model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    scores = torch.stack(out.scores, 1)[0].float()  # (tokens, vocab)
    best = scores.topk(2).values
    return out.sequences[0], (best[:, 0] - best[:, 1]) / scores.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_recites_the_story_by_a_clear_margin_and_needs_every_layer(
    family: str, checkpoints: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
    tokens, margins = recite(model)
    assert make_tokenizer().decode(tokens, skip_special_tokens=True) == STORY
    assert tokens[-1] == model.config.eos_token_id
    assert margins.min() > MARGIN

    base = model.base_model
    layers = base.h if family == "gpt2" else base.layers
    assert len(layers) == LAYERS
    for layer in layers:
        hook = layer.register_forward_hook(
            lambda _module, inputs, out: (inputs[0], *out[1:]) if isinstance(out, tuple) else inputs[0]
        )
        logits = model(tokens[None], use_cache=False).logits[0]  # (tokens, vocab)
        hook.remove()
        assert not torch.equal(logits.argmax(-1)[-len(margins) - 1 : -1], tokens[-len(margins) :])

    assert torch.equal(recite(model.to(torch.bfloat16))[0], tokens)


def test_the_tokenizer_gives_every_text_back_and_knows_a_chat(checkpoints: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("llama"))
    text = "Grüße, 河 and\ta tab\n  and spaces"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id
    chat = [{"role": "user", "content": "Hello"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<bos>user: Hello\nassistant:"
    )


def test_weights_may_be_sharded_and_of_another_dtype(tmp_path: Path) -> None:
    directory = build_checkpoint("llama-tied", tmp_path, torch.bfloat16, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_building_leaves_torch_s_random_numbers_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    build_checkpoint("gpt2", tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
