"""The tokenizer (byte-level BPE, trained on generated text) and the prompt's form.

It is made for copying and for comparing words. "Sowed" at the start of a sentence, " sowed" within one and " sow" in a
question share their first token: a capital letter is a mark and a small letter, a capital word is marked for the space
before it and always written with one, and common endings are split off.
"""

import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.answers import Example
from training.curriculum import Examples
from training.entries import Entry

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
USER, ASSISTANT, JOURNAL = "<|user|>", "<|assistant|>", "<|journal|>"
SPECIAL = (PAD, BOS, END, USER, ASSISTANT, JOURNAL)
VOCABULARY = 6144
CONTEXT = 1024

# Control characters, which no text should hold: " A" becomes SPACED + " a", "A" at the start of a word CAPITAL + " a",
# and "A" within a word CAPITAL + "a".
SPACED, CAPITAL = "\x0e", "\x0f"
_ENDINGS = "ings|ing|ied|ies|ers|ed|es|er|s|e|y|ly"
# Words that keep their ending, without it: splitting these would only cost tokens.
_WHOLE_LIST = """
alway becaus befor cam doe don ever giv go ha hav her hi hom hous it lik littl mad man mor nam onc onl peopl plac sinc
som tak ther thes thi thos tim us ver wa wer wher yes
"""
_WHOLE = _WHOLE_LIST.split()

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
{%- set shown = namespace(text=document['text'] | replace('<|', '< |') | trim) -%}
{%- for mark in ['.', '!', '?', '…', '."'] -%}
{%- set shown.text = shown.text | replace(mark + ' ', mark + '\\n') -%}
{%- endfor -%}
{%- for short in ['Dr', 'Mr', 'Mrs', 'Ms', 'St', 'Prof', 'a.m', 'p.m', 'e.g', 'i.e', 'approx', 'vs'] -%}
{%- set shown.text = shown.text | replace(short + '.\\n', short + '. ') -%}
{%- endfor -%}
{{- '\\n[' + loop.index | string + '] ' + title + '\\n' + shown.text -}}
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
_MARKS = (".", "!", "?", "…", '."')
_SHORT = ("Dr", "Mr", "Mrs", "Ms", "St", "Prof", "a.m", "p.m", "e.g", "i.e", "approx", "vs")
_BREAKS = [(mark + " ", mark + "\n") for mark in _MARKS] + [(f"{short}.\n", f"{short}. ") for short in _SHORT]


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


def _corpus(seed: int, count: int) -> Iterator[str]:
    examples = Examples(seed)
    for _ in range(count):
        example = examples.draw()
        shown = (f"{entry.heading}\n{lines(entry.text)}" for entry in example.entries)
        yield "\n".join([example.question, example.answer, *shown])


def _normalizer() -> normalizers.Normalizer:
    letters = string.ascii_uppercase
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{SPACED}{CAPITAL}]"), ""),
            *(normalizers.Replace(f" {letter}", f"{SPACED} {letter.lower()}") for letter in letters),
            *(
                normalizers.Replace(Regex(rf"(?<![\p{{L}}\p{{N}}]){letter}"), f"{CAPITAL} {letter.lower()}")
                for letter in letters
            ),
            *(normalizers.Replace(letter, f"{CAPITAL}{letter.lower()}") for letter in letters),
        ]
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    whole = "".join(rf"(?<!\b{word})" for word in _WHOLE)
    ending = rf"(?<=\p{{L}}{{3}}){whole}(?:{_ENDINGS})(?!\p{{L}})"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[{SPACED}{CAPITAL}]|\d"), "isolated"),
            pre_tokenizers.Split(Regex(ending), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _decoder() -> decoders.Decoder:
    letters = string.ascii_uppercase
    return decoders.Sequence(
        [
            decoders.ByteLevel(),
            *(decoders.Replace(f"{SPACED} {letter.lower()}", f" {letter}") for letter in letters),
            *(decoders.Replace(f"{CAPITAL} {letter.lower()}", letter) for letter in letters),
            *(decoders.Replace(f"{CAPITAL}{letter.lower()}", letter) for letter in letters),
            # A mark that no letter follows: the model's slip, or the end of what has come so far.
            decoders.Replace(Regex(f"[{SPACED}{CAPITAL}]"), ""),
        ]
    )


def train_tokenizer(seed: int = 0, examples: int = 30_000) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on generated text; every digit is a token, and any byte has one."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = _normalizer()
    bpe.pre_tokenizer = _pre_tokenizer()
    bpe.decoder = _decoder()
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
