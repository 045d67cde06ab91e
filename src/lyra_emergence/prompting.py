"""From a question, journal passages and earlier turns to the token ids that a model continues.

Three forms, by what the tokenizer has: a chat template that renders `documents` gets them as documents; any other chat
template gets the numbered entries in the user's message; a model without a template gets plain text to complete.

Text from a journal, a user or an earlier answer can hold the characters of a control token, such as "<|end|>", and a
tokenizer would turn them into that token: a journal entry could end the user's turn and begin a system's.
`ControlTokens` breaks such text up beforehand; everything else is tokenized as transformers would.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import GenerationError
from lyra_emergence.journal.text import one_line, plain, without_runs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ControlTokens", "Excerpt", "Exchange", "PromptWriter", "instructed", "plain_messages"]

_INSTRUCTION = (
    "Answer the question from the journal entries below, in a sentence or two. Cite the entries that you use by their "
    "number, like [1]. If they do not hold the answer, say so."
)
_PLAIN_STOPS = ("\nQuestion:", "\nJournal entries:")


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A passage as it is shown to the model.

    Attributes:
        number: What the answer cites it by, from 1.
        heading: Its date and title, such as "2025-03-02 · Garden plans".
        text: The passage.
    """

    number: int
    heading: str
    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """An earlier question and its answer."""

    question: str
    answer: str


class ControlTokens:
    """The control tokens of a tokenizer, and text made free of them.

    These are its special tokens, and the added tokens that its chat template writes, such as "<tool_call>".

    Args:
        tokenizer: A transformers tokenizer.
        template: Its chat template, or "".
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        controls = {
            number: token.content
            for number, token in added.items()
            if token.special or (token.content.strip() and token.content in template)
        }
        strings = {*controls.values(), *tokenizer.all_special_tokens}
        # Longest first, so that a token within another one leaves the longer one broken too.
        self._strings = sorted((string for string in strings if string.strip()), key=lambda text: (-len(text), text))
        # Characters that a vocabulary lacks become the unknown token by right.
        self._ids = frozenset({*controls, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})

    def without(self, text: str) -> str:
        """Return `text` changed where it would become a control token: "<|end|>" becomes "< |end|>"."""
        for string in self._strings:
            text = text.replace(string, f"{string[0]} {string[1:]}" if len(string) > 1 else "")
        # A tokenizer may normalize before it looks for its tokens (case, width), so it has the last word.
        return re.sub(r"[^\w\s.,;:!?'-]", " ", text) if self._made_from(text) else text

    def _made_from(self, text: str) -> bool:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return not self._ids.isdisjoint(ids)


class PromptWriter:
    """Writes prompts for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        system: The system message, or None for none.

    Attributes:
        stops: Strings at which an answer must stop, beside the model's own end token.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = _chat_template(tokenizer)
        self._controls = ControlTokens(tokenizer, self._template)
        self._system = self._clean(system or "")
        self._renders_documents = re.search(r"\bdocuments\b", self._template) is not None
        self.stops: tuple[str, ...] = () if self._template else _PLAIN_STOPS

    def write(self, question: str, excerpts: tuple[Excerpt, ...] = (), earlier: tuple[Exchange, ...] = ()) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            GenerationError: The model's chat template does not work.
        """
        question = self._clean(question)
        earlier = tuple(Exchange(self._clean(past.question), self._clean(past.answer)) for past in earlier)
        excerpts = tuple(
            Excerpt(part.number, self._controls.without(part.heading), self._clean_line(part.text)) for part in excerpts
        )
        if not self._template:
            return self._encode(_completion(self._system, question, excerpts, earlier), special=True)
        if self._renders_documents:
            documents = [{"title": excerpt.heading, "text": excerpt.text} for excerpt in excerpts]
            return self._encode(self._render(question, earlier, documents), special=False)
        return self._encode(self._render(_with_entries(question, excerpts), earlier), special=False)

    def converse(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a whole conversation, given as messages with a `role` and its `content`.

        The system message given to this writer is not part of it. A template that refuses a system message gets its
        text before that of the first other message.

        Raises:
            GenerationError: The model's chat template does not work.
        """
        cleaned = [{"role": part["role"], "content": self._clean(part["content"])} for part in messages]
        if not self._template:
            return self._encode(_script(cleaned), special=True)
        return self._encode(self._rendered(cleaned, None), special=False)

    def _clean(self, text: str) -> str:
        return self._controls.without(plain(text).strip())

    def _clean_line(self, text: str) -> str:
        # On one line, so that a passage cannot pretend to be the next numbered entry.
        return self._controls.without(without_runs(one_line(text)))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _render(
        self, message: str, earlier: tuple[Exchange, ...], documents: list[dict[str, str]] | None = None
    ) -> str:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return self._rendered([*system, *_messages(message, earlier)], documents)

    def _rendered(self, messages: list[dict[str, str]], documents: list[dict[str, str]] | None) -> str:
        from jinja2 import TemplateError

        try:
            return self._apply(messages, documents)
        except TemplateError as exc:
            folded = _without_system(messages)
            if folded is None:
                raise _template_failed(exc) from exc
        # Some templates have no system role and raise: the first message carries the text instead.
        try:
            return self._apply(folded, documents)
        except TemplateError as exc:
            raise _template_failed(exc) from exc

    def _apply(self, messages: list[dict[str, str]], documents: list[dict[str, str]] | None) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                documents=documents or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Return messages whose first other one carries the system's texts; None where there is no system or no other."""
    system = [part["content"] for part in messages if part["role"] == "system"]
    others = [part for part in messages if part["role"] != "system"]
    if not (system and others):
        return None
    return [{**others[0], "content": "\n\n".join([*system, others[0]["content"]])}, *others[1:]]


def _template_failed(exc: Exception) -> GenerationError:
    return GenerationError(
        f"the model's chat template failed: {exc}",
        hint="the template in the model's folder is wrong, or use another model",
    )


def _chat_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or ""


def instructed(question: str, excerpts: tuple[Excerpt, ...]) -> str:
    """Return the message that asks `question` over numbered entries, for a model whose template is not here."""
    listed = tuple(Excerpt(part.number, part.heading, without_runs(one_line(part.text))) for part in excerpts)
    return _with_entries(plain(question).strip(), listed)


def plain_messages(message: str, earlier: tuple[Exchange, ...]) -> list[dict[str, str]]:
    """Return a conversation as messages with roles, ending with `message`."""
    return _messages(message, earlier)


def _messages(message: str, earlier: tuple[Exchange, ...]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for past in earlier:
        messages += [{"role": "user", "content": past.question}, {"role": "assistant", "content": past.answer}]
    return [*messages, {"role": "user", "content": message}]


def _entries(excerpts: tuple[Excerpt, ...]) -> str:
    listed = "\n\n".join(f"[{excerpt.number}] {excerpt.heading}\n{excerpt.text}" for excerpt in excerpts)
    return f"Journal entries:\n{listed}"


def _with_entries(question: str, excerpts: tuple[Excerpt, ...]) -> str:
    return f"{_INSTRUCTION}\n\n{_entries(excerpts)}\n\nQuestion: {question}" if excerpts else question


def _script(messages: list[dict[str, str]]) -> str:
    """Return a conversation as text to complete, as `_completion` writes it."""
    names = {"user": "Question: ", "assistant": "Answer: "}
    said = [names.get(part["role"], "") + part["content"] for part in messages]
    parts: list[str] = []
    for part, text in zip(messages, said, strict=True):
        follows = part["role"] == "assistant" and parts
        if follows:
            parts[-1] += f"\n{text}"
        else:
            parts.append(text)
    return "\n\n".join(parts) + "\nAnswer:"


def _completion(system: str, question: str, excerpts: tuple[Excerpt, ...], earlier: tuple[Exchange, ...]) -> str:
    opening = [system] if system else []
    if excerpts:
        opening += [_INSTRUCTION, _entries(excerpts)]
    asked = [f"Question: {past.question}\nAnswer: {past.answer}" for past in earlier]
    return "\n\n".join((*opening, *asked, f"Question: {question}\nAnswer:"))
