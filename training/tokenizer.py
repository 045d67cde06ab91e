"""The tokenizer (byte-level BPE, trained on generated text) and the prompt's form.

It is made for copying and for comparing words. "Sowed" at the start of a sentence, " sowed" within one and " sow" in a
question share their first token: a capital letter is a mark and a small letter, a capital word is marked for the space
before it and always written with one, and common endings are split off.
"""

import json
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training import marks
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
# them. Every sentence begins a line, as the answer does, behind a mark that says how well its words match the
# question's (marks.py). "<|" in a text is broken up, so that no text can close its turn.
CHAT_TEMPLATE = """\
{%- set stop = 'STOP_WORDS'.split() -%}
{%- macro flat(text) -%}
{%- set plain = namespace(text=text | lower) -%}
{%- for mark in SEPARATORS -%}
{%- set plain.text = plain.text | replace(mark, ' ') -%}
{%- endfor -%}
{{- plain.text -}}
{%- endmacro -%}
{%- macro stems(words) -%}
{{- ' ' -}}
{%- for word in words -%}
{%- if word | length > 4 -%}
{{- word[:4] + ' ' -}}
{%- elif word | length == 4 and word[-1] == 's' -%}
{{- word[:-1] + ' ' -}}
{%- else -%}
{{- word + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- macro sentences(text) -%}
{%- set shown = namespace(text=text | replace('<|', '< |') | trim) -%}
{%- for mark in MARKS -%}
{%- set shown.text = shown.text | replace(mark + ' ', mark + '\\n') -%}
{%- endfor -%}
{%- for short in SHORT -%}
{%- set shown.text = shown.text | replace(short + '.\\n', short + '. ') -%}
{%- endfor -%}
{{- shown.text -}}
{%- endmacro -%}
{%- macro entries(question) -%}
{%- set told = namespace(words=[], lines=[], scores=[], at=0) -%}
{%- for word in flat(question).split() if word not in stop -%}
{%- set told.words = told.words + [stems([word])] -%}
{%- endfor -%}
{%- set asked = told.words | unique(true) | list -%}
{%- for document in documents -%}
{%- for line in sentences(document['text']).split('\\n') -%}
{%- set told.lines = told.lines + [stems(flat(line).split())] -%}
{%- endfor -%}
{%- endfor -%}
{%- for document in documents -%}
{%- set heading = stems(flat(document['title'] | default('', true)).split()) -%}
{%- for line in sentences(document['text']).split('\\n') -%}
{%- set sum = namespace(score=0) -%}
{%- set first = loop.first -%}
{%- for word in asked -%}
{%- if word in told.lines[told.at] -%}
{%- set held = namespace(count=0) -%}
{%- for other in told.lines if word in other -%}{%- set held.count = held.count + 1 -%}{%- endfor -%}
{%- set sum.score = sum.score + held.count ** -0.5 -%}
{%- elif not first and word in told.lines[told.at - 1] -%}
{%- set sum.score = sum.score + 0.2 -%}
{%- elif word in heading -%}
{%- set sum.score = sum.score + 0.3 -%}
{%- endif -%}
{%- endfor -%}
{%- set told.scores = told.scores + [sum.score] -%}
{%- set told.at = told.at + 1 -%}
{%- endfor -%}
{%- endfor -%}
{%- set ranked = told.scores | sort(reverse=true) -%}
{%- set told.at = 0 -%}
{%- for document in documents -%}
{{- '\\n[' + loop.index | string + '] ' + document['title'] | default('', true) | replace('<|', '< |') | trim -}}
{%- for line in sentences(document['text']).split('\\n') -%}
{%- set score = told.scores[told.at] -%}
{%- set told.at = told.at + 1 -%}
{{- '\\n' -}}
{%- if score == 0 -%}
{{- NONE -}}
{%- elif score == ranked[0] or score == ranked[1] -%}
{%- set level = BEST if score == ranked[0] else SECOND -%}
{%- set share = score / (asked | length) -%}
{{- level[0] if share >= 0.6 else level[1] if share >= 0.35 else level[2] -}}
{%- else -%}
{{- SOME -}}
{%- endif -%}
{{- line -}}
{%- endfor -%}
{%- endfor -%}
{%- endmacro -%}
{%- set talk = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set users = talk | selectattr('role', 'equalto', 'user') | list | length -%}
{%- set seen = namespace(users=0) -%}
{{- bos_token -}}
{%- for message in talk -%}
{%- set text = message['content'] | replace('<|', '< |') | trim -%}
{%- if message['role'] == 'user' -%}
{%- set seen.users = seen.users + 1 -%}
{{- '<|user|>' + text -}}
{%- if documents and seen.users == users -%}
{{- '<|journal|>' + entries(text) + '<|journal|>' + text[:300] -}}
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


def chat_template() -> str:
    """Returns the template with its lists written out."""

    def listed(values: Sequence[str]) -> str:
        return "[" + ", ".join(json.dumps(value) for value in values) + "]"

    template = CHAT_TEMPLATE.replace("'STOP_WORDS'", f"'{' '.join(marks.STOP)}'")
    lists = {
        "SEPARATORS": marks.SEPARATORS,
        "MARKS": _MARKS,
        "SHORT": _SHORT,
        "BEST": marks.BEST,
        "SECOND": marks.SECOND,
    }
    for name, values in lists.items():
        template = re.sub(rf"\b{name}\b", lambda _, values=values: listed(values), template)
    for name, value in (("NONE", marks.NONE), ("SOME", marks.SOME)):
        template = re.sub(rf"\b{name}\b", lambda _, value=value: json.dumps(value), template)
    return template


def lines(text: str) -> str:
    """Returns `text` with every sentence on a line of its own."""
    for old, new in _BREAKS:
        text = text.replace(old, new)
    return text


def render(question: str, entries: Sequence[Entry], turns: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the prompt as the chat template renders it with a generation prompt."""
    earlier = "".join(f"{USER}{asked}{END}{ASSISTANT}{said}{END}" for asked, said in turns)
    split = [(entry.heading, lines(entry.text).split("\n")) for entry in entries]
    shown = "".join(
        f"\n[{number}] {heading}" + "".join(f"\n{mark}{line}" for mark, line in zip(found, sentences, strict=True))
        for number, ((heading, sentences), found) in enumerate(
            zip(split, marks.marks(question, split), strict=True), start=1
        )
    )
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
        # What the template breaks in two ends with its last line.
        shown = lines(sentence).rpartition("\n")[2]
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
            pre_tokenizers.Split(Regex(rf"[{SPACED}{CAPITAL}{''.join(marks.ALL)}]|\d"), "isolated"),
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
        chat_template=chat_template(),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_tokenizer(directory: Path, seed: int = 0) -> PreTrainedTokenizerFast:
    """Returns the tokenizer saved in `directory`, trained first if there is none."""
    if not (directory / "tokenizer.json").is_file():
        train_tokenizer(seed).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    # The form may have been reworded since; the vocabulary may not.
    tokenizer.chat_template = chat_template()
    tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer()
    return tokenizer
