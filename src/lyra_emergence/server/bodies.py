"""What a request may hold: models made from the types of the `openai` package, so that no schema is written here.

A field is in one of three groups. TAKEN has an effect. WITHOUT_EFFECT is about the service behind a request, and
changes no answer. NEUTRAL would change one, and is taken only with the value that asks for nothing. All others that the
package knows are refused by name, and so is what it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Required, get_origin, get_type_hints

from openai.types import completion_create_params as plain
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chat
from openai.types.shared_params import ResponseFormatText
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

__all__ = ["ChatBody", "CompletionBody", "Seed", "Tokens", "known_fields"]


def _whole(value: object) -> object:
    """Return a number without a fraction as an integer: JSON knows no difference, and its schemas make none."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]
# Their limits stand before the validator: behind it, the schema would not tell them.
Tokens = Annotated[int, Field(ge=1, le=2**31), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]
_One = Annotated[Literal[1], BeforeValidator(_whole)]
_Zero = Annotated[float, Field(ge=0, le=0)]
_Nothing = Annotated[list[Any], Field(max_length=0)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_LIMITS: Final[dict[str, Any]] = {
    "temperature": Field(ge=0, le=2),
    "top_p": Field(ge=0, le=1),
}
# Where the package's type is an iterable that pydantic would read only when it is used, or leaves open what is bounded.
_NARROWED: Final[dict[str, Any]] = {
    "messages": Annotated[list[ChatCompletionMessageParam], Field(min_length=1)],
    "prompt": str | list[_Whole] | Annotated[list[str], Field(min_length=1, max_length=1)],
    "stop": _Stop | Annotated[list[_Stop], Field(max_length=16)] | None,
    "model": str,
    "seed": Seed,
    "max_tokens": Tokens,
    "max_completion_tokens": Tokens,
}
_TAKEN: Final = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream_options")
_TAKEN_CHAT: Final = ("messages", "max_completion_tokens")
_WITHOUT_EFFECT: Final = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
_NEUTRAL: Final[dict[str, Any]] = {
    "n": _One,
    "best_of": _One,
    "presence_penalty": _Zero,
    "frequency_penalty": _Zero,
    "logit_bias": Annotated[dict[str, _Whole], Field(max_length=0)],
    "logprobs": Literal[False],
    "echo": Literal[False],
    "suffix": Literal[""],
    "response_format": ResponseFormatText,
    "tools": _Nothing,
    "tool_choice": Literal["none", "auto"],
    "functions": _Nothing,
}


def known_fields(body: type[BaseModel]) -> frozenset[str]:
    """Return the fields that OpenAI's own form of `body` has, whether they are supported here or not."""
    return frozenset(get_type_hints(_FORMS[body.__name__]))


_FORMS: Final[dict[str, Any]] = {
    "ChatCompletionRequest": chat.CompletionCreateParamsNonStreaming,
    "CompletionRequest": plain.CompletionCreateParamsNonStreaming,
}


def _body(name: str, taken: tuple[str, ...]) -> type[BaseModel]:
    hints = get_type_hints(_FORMS[name])
    # `__required_keys__` is of no use: the package's annotations are texts when it is made.
    marked = get_type_hints(_FORMS[name], include_extras=True)
    required = {key for key, hint in marked.items() if get_origin(hint) is Required}
    fields: dict[str, Any] = {"stream": (bool | None, None)}
    for key in (*taken, *_WITHOUT_EFFECT):
        if key in hints:
            kind = _NARROWED.get(key, hints[key])
            kind = Annotated[kind, _LIMITS[key]] if key in _LIMITS else kind
            fields[key] = (kind, ...) if key in required else (kind | None, None)
    fields |= {key: (kind | None, None) for key, kind in _NEUTRAL.items() if key in hints}
    made: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    return made


ChatBody = _body("ChatCompletionRequest", (*_TAKEN, *_TAKEN_CHAT))
CompletionBody = _body("CompletionRequest", (*_TAKEN, "prompt"))
