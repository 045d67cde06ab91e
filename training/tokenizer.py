"""The tokenizer (byte-level BPE, trained on generated text) and the prompt's form."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.entries import Entry
from training.questions import STAGES, Example, draw_example

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
USER, ASSISTANT, JOURNAL = "<|user|>", "<|assistant|>", "<|journal|>"
SPECIAL = (PAD, BOS, END, USER, ASSISTANT, JOURNAL)
VOCABULARY = 3072
CONTEXT = 1024

# The question stands before the entries, so that the model knows while it reads them what is asked, and again after
# them. Every sentence begins a line, as the answer does: byte-level tokens differ with a space before them, and copying
# wants the same ones. "<|" in a text is broken up, so that no text can close its turn.
CHAT_TEMPLATE = """\
{%- set talk = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set asked = talk | selectattr('role', 'equalto', 'user') | list | length -%}
{%- set seen = namespace(users=0) -%}
{{- bos_token -}}
{%- for message in talk -%}
{%- set text = message['content'] | replace('<|', '< |') | trim -%}
{%- if message['role'] == 'user' -%}
{%- set seen.users = seen.users + 1 -%}
{{- '<|user|>' + text -}}
{%- if documents and seen.users == asked -%}
{{- '<|journal|>' -}}
{%- for document in documents -%}
{%- set title = document['title'] | default('', true) | replace('<|', '< |') | trim -%}
{%- set lines = document['text'] | replace('<|', '< |') | trim | replace('. ', '.\\n') | replace('! ', '!\\n')
    | replace('? ', '?\\n') | replace('… ', '…\\n') | replace('Dr.\\n', 'Dr. ') | replace('Mr.\\n', 'Mr. ')
    | replace('Mrs.\\n', 'Mrs. ') | replace('Ms.\\n', 'Ms. ') -%}
{{- '\\n[' + loop.index | string + '] ' + title + '\\n' + lines -}}
{%- endfor -%}
{{- '<|journal|>' + text[:300] -}}
{%- endif -%}
{{- '<|end|>' -}}
{%- else -%}
{{- '<|assistant|>' + text + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""
_BREAKS = [(mark + " ", mark + "\n") for mark in ".!?…"] + [
    (f"{title}.\n", f"{title}. ") for title in ("Dr", "Mr", "Mrs", "Ms")
]


def lines(text: str) -> str:
    """Returns `text` with every sentence on a line of its own, as the chat template shows it."""
    for old, new in _BREAKS:
        text = text.replace(old, new)
    return text


def render(question: str, entries: Sequence[Entry], turns: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the prompt as `CHAT_TEMPLATE` renders it with a generation prompt."""
    earlier = "".join(f"{USER}{asked}{END}{ASSISTANT}{said}{END}" for asked, said in turns)
    shown = "".join(f"\n[{number}] {entry.heading}\n{lines(entry.text)}" for number, entry in enumerate(entries, 1))
    read = f"{JOURNAL}{shown}{JOURNAL}{question[:300]}" if entries else ""
    return f"{BOS}{earlier}{USER}{question}{read}{END}{ASSISTANT}"


def example_text(example: Example) -> tuple[str, str]:
    """Returns (prompt, answer with its stop token)."""
    return render(example.question, example.entries, example.turns), example.answer + END


def sentence_ends(example: Example, prompt: str) -> list[tuple[int, bool]]:
    """Returns, for each sentence of the entries, the index of its last character in `prompt` and whether it answers."""
    ends = []
    at = prompt.find(JOURNAL)
    for sentence in (sentence for entry in example.entries for sentence in entry.sentences):
        shown = lines(sentence)
        found = prompt.find(shown, at)
        if found >= 0:
            at = found + len(shown)
            ends.append((at - 1, sentence == example.source))
    return ends


def _corpus(seed: int, examples: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(examples):
        example = draw_example(rng, len(STAGES) - 1)
        yield "\n".join(
            [
                example.question,
                example.answer,
                *(f"{e.heading}\n{lines(e.text)}" for e in example.entries),
            ]
        )


def train_tokenizer(seed: int = 0, examples: int = 20_000) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on generated text; every digit is a token, and any byte has one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(seed, examples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, JOURNAL],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_tokenizer(directory: Path, seed: int = 0) -> PreTrainedTokenizerFast:
    """Returns the tokenizer saved in `directory`, trained first if there is none."""
    if not (directory / "tokenizer.json").is_file():
        train_tokenizer(seed).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE  # the form may have been reworded since; the vocabulary may not
    return tokenizer
