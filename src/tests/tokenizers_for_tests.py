"""Tokenizers whose counts are plain: one token for each byte of text, one for each control token."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["DOCUMENTS", "NO_SYSTEM", "TURNS", "byte_tokenizer"]

CONTROLS = ("<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")

TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
DOCUMENTS = (
    "{% if documents %}<|system|>{% for document in documents %}"
    "[{{ loop.index }}] {{ document.title }}\n{{ document.text }}\n{% endfor %}<|end|>{% endif %}" + TURNS
)


def byte_tokenizer(template: str | None = TURNS, *, lowercase_controls: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges.

    Args:
        template: Its chat template.
        lowercase_controls: Whether text is lower-cased before control tokens are looked for.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if lowercase_controls:
        core.normalizer = normalizers.Lowercase()
    core.add_special_tokens([AddedToken(text, normalized=lowercase_controls, special=True) for text in CONTROLS])
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<|unk|>", eos_token="<|end|>", chat_template=template
    )
