"""From a request's body to what the engine is asked: token ids and options."""

from __future__ import annotations

import re
import secrets
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from lyra_emergence.chunks import GenerationOptions
from lyra_emergence.errors import GenerationError, RequestError
from lyra_emergence.prompting import PromptWriter
from lyra_emergence.server.engine import Asked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.prompting import Excerpt, Exchange
    from lyra_emergence.speaker import Writer

__all__ = ["Asking", "check_unicode"]

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_COLDEST: Final = 1e-6
"""The temperature below which no other token than the likeliest has a chance."""
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Asking:
    """Reads requests for one model. May be used by several threads.

    Args:
        loaded: The model.
        name: What clients call it.
    """

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self.name = name
        self._loaded = loaded
        self._defaults = GenerationOptions.for_model(loaded)
        self._writer = PromptWriter(loaded.tokenizer)
        # Tokenizers of the `tokenizers` library refuse to be changed by one thread while another one uses them.
        self._lock = threading.Lock()

    @property
    def writer(self) -> Writer:
        """What writes prompts over a journal; may be used by several threads."""
        return _OneAtATime(self._writer, self._lock)

    def chat(self, body: Any) -> Asked:
        """Return what a chat completion asks for.

        Raises:
            RequestError: Another model is named, a message is of a kind that is not supported, the prompt is too long.
            GenerationError: The model's chat template does not work.
        """
        self._check_model(body.model)
        messages = [_message(at, message) for at, message in enumerate(body.messages)]
        with self._lock:
            prompt = self._writer.converse(messages)
        limit = body.max_completion_tokens or body.max_tokens
        return self._asked(prompt, self.options(body, limit, self._writer.stops), "messages")

    def completion(self, body: Any) -> Asked:
        """Return what a completion asks for.

        Raises:
            RequestError: Another model is named, or the prompt is empty, too long, or has token ids that there are not.
        """
        self._check_model(body.model)
        prompt = body.prompt
        if isinstance(prompt, list) and isinstance(prompt[0] if prompt else 0, str):
            prompt = prompt[0]
        ids = self._encoded(prompt) if isinstance(prompt, str) else self._checked(prompt)
        return self._asked(ids, self.options(body, body.max_tokens, ()), "prompt")

    def _encoded(self, text: str) -> list[int]:
        from lyra_emergence.generation import encode_prompt

        check_unicode("prompt", text)
        with self._lock:
            try:
                return encode_prompt(self._loaded, text)
            except GenerationError as error:
                code = "context_length_exceeded" if text else "invalid_value"
                raise RequestError(str(error), param="prompt", code=code, hint=error.hint) from error

    def _checked(self, ids: list[int]) -> list[int]:
        count = len(self._loaded.tokenizer)
        wrong = next((token for token in ids if not 0 <= token < count), None)
        if wrong is not None:
            raise RequestError(f"'prompt': there is no token {wrong}; they go from 0 to {count - 1}", param="prompt")
        if not ids:
            raise RequestError("'prompt': the prompt is empty", param="prompt", hint="write something to continue from")
        return ids

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise RequestError(
                f"the model '{name[:200]}' does not exist here",
                status=404,
                code="model_not_found",
                param="model",
                hint=f"this server has '{self.name}' alone",
            )

    def _asked(self, prompt: list[int], options: GenerationOptions, param: str) -> Asked:
        context = self._loaded.context_length
        if len(prompt) >= context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and the context holds {context} with the answer",
                code="context_length_exceeded",
                param=param,
                hint="shorten the prompt, or start the server with a longer context (--context) if the model allows it",
            )
        most = min(options.max_new_tokens, context - len(prompt))
        return Asked(tuple(prompt), replace(options, max_new_tokens=most))

    def options(self, body: Any, limit: int | None, stops: tuple[str, ...]) -> GenerationOptions:
        """Return how to generate what a body asks for.

        Args:
            body: With `seed`, `temperature`, `top_p` and `stop`, each None for what the configuration says.
            limit: Tokens of the answer at most, or None likewise.
            stops: Texts that end it beside those of the body.
        """
        given: dict[str, Any] = {"max_new_tokens": limit, "seed": body.seed}
        if body.temperature is not None or body.top_p is not None:
            given |= _sampling(body.temperature, body.top_p)
        options = replace(self._defaults, **{name: value for name, value in given.items() if value is not None})
        asked = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        options = replace(options, stop=(*options.stop, *asked, *stops))
        if options.do_sample and options.seed is None:
            # Answers that run at once would draw from one and the same generator otherwise.
            options = replace(options, seed=secrets.randbits(63))
        return options


@dataclass(frozen=True, slots=True)
class _OneAtATime:
    """A writer that threads use one after the other."""

    inner: PromptWriter
    lock: threading.Lock

    @property
    def stops(self) -> tuple[str, ...]:
        return self.inner.stops

    def write(
        self, question: str, excerpts: tuple[Excerpt, ...] = (), earlier: tuple[Exchange, ...] = (), /
    ) -> list[int]:
        with self.lock:
            return self.inner.write(question, excerpts, earlier)


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Return the options of sampling; next to nothing for either asks for the likeliest token each time."""
    # Logits that are divided by less are no numbers any more.
    if top_p == 0 or (temperature is not None and temperature < _COLDEST):
        return {"do_sample": False, "temperature": 1.0, "top_p": 1.0}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def _message(at: int, message: Any) -> dict[str, str]:
    place = f"messages.{at}"
    role = _ROLES.get(message["role"])
    if role is None or any(message.get(key) for key in ("tool_calls", "function_call", "audio")):
        raise RequestError(
            f"'{place}': messages of tools are not supported",
            code="unsupported_value",
            param=place,
            hint="send messages of system, user and assistant with text",
        )
    return {"role": role, "content": _text(f"{place}.content", message.get("content"))}


def _text(place: str, content: str | Iterable[Any] | None) -> str:
    if isinstance(content, str):
        check_unicode(place, content)
        return content
    try:
        parts = list(content or ())  # read only now: the type is an iterable
    except ValidationError as error:
        told, hint = error.errors()[0]["msg"].lower(), "/openapi.json describes what may be sent"
        raise RequestError(f"'{place}': {told}", param=place, hint=hint) from error
    for part in parts:
        if part.get("type") != "text":
            raise RequestError(
                f"'{place}': a part of type '{part.get('type')}' is not supported",
                code="unsupported_value",
                param=place,
                hint="send text",
            )
    text = "".join(part["text"] for part in parts)
    check_unicode(place, text)
    return text


def check_unicode(place: str, text: str) -> None:
    """Refuse a text that no tokenizer has a form for.

    Raises:
        RequestError: It holds half of a surrogate pair.
    """
    # JSON can write half of a surrogate pair, which tokenizers have no form for.
    if _SURROGATE.search(text):
        raise RequestError(f"'{place}': the text holds half of a surrogate pair", param=place, hint="send UTF-8")
