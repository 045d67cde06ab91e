"""The generation settings that `pipeline_kwargs` may hold: all that Lyra's generation honors, and nothing else.

A setting that would be ignored is an error, since an answer that silently disregards it cannot be told from a
right one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lyra_emergence.config.problems import did_you_mean, mismatch, shown

if TYPE_CHECKING:
    from lyra_emergence.config.problems import Problems

__all__ = ["GENERATION_SETTINGS", "Setting", "check_pipeline_kwargs", "pipeline_kwargs_schema"]

_MOST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """One generation setting.

    Attributes:
        kind: "whole", "number", "boolean", or "texts" (a list of texts; one text stands for a list of one).
        description: Meaning and unit, for the schema.
        minimum: Smallest value; for kind "number" it is excluded where `above` is true.
        maximum: Largest value.
        above: Whether the value must be greater than `minimum`.
    """

    kind: Literal["whole", "number", "boolean", "texts"]
    description: str
    minimum: int = 0
    maximum: int | None = None
    above: bool = False

    def range_text(self) -> str:
        """Return what to write, such as "a number above 0 and at most 1"."""
        noun = "a whole number" if self.kind == "whole" else "a number"
        lower = f"above {self.minimum}" if self.above else f"of at least {self.minimum}"
        return f"{noun} {lower}" if self.maximum is None else f"{noun} {lower} and at most {self.maximum}"


GENERATION_SETTINGS = {
    "max_new_tokens": Setting("whole", "Most tokens to generate; cut to what the model's context leaves.", minimum=1),
    "do_sample": Setting("boolean", "true draws tokens at random, false always takes the likeliest."),
    "temperature": Setting("number", "Sharpness of sampling: below 1 sharper, above 1 flatter, 0 the likeliest."),
    "top_k": Setting("whole", "Sample from the k likeliest tokens only; 0 means all."),
    "top_p": Setting("number", "Sample from the likeliest tokens whose probabilities sum to p.", maximum=1, above=True),
    "repetition_penalty": Setting(
        "number", "Above 1 makes tokens that stand in the text less likely; 1 is off.", above=True
    ),
    "max_repeats": Setting(
        "whole", "End the answer where its last tokens stand more than this many times in a row; 0 is never."
    ),
    "stop": Setting("texts", "Texts that end the answer; they are not part of it."),
    "seed": Setting("whole", "Start of the random numbers, for the same answer each time.", maximum=_MOST),
    "return_full_text": Setting("boolean", "Whether a pipeline's answer repeats the prompt in front of it."),
}
"""Every setting that generation honors, by name."""

_ONE_SEQUENCE = "Lyra generates one sequence, greedily or by sampling; remove it"
_FROM_CHECKPOINT = "Lyra takes it from the checkpoint; remove it"
_REMEDIES = {
    "max_length": "write 'max_new_tokens'",
    "max_tokens": "write 'max_new_tokens'",
    "stop_strings": "write 'stop'",
    "stop_sequence": "write 'stop'",
    "stop_sequences": "write 'stop'",
    "random_seed": "write 'seed'",
    "num_beams": _ONE_SEQUENCE,
    "num_return_sequences": _ONE_SEQUENCE,
    "batch_size": _ONE_SEQUENCE,
    "eos_token_id": _FROM_CHECKPOINT,
    "pad_token_id": _FROM_CHECKPOINT,
}


def check_pipeline_kwargs(value: object, at: str, problems: Problems) -> dict[str, Any] | None:
    """Return a checked copy of `value`; whatever is wrong goes to `problems`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        problems.add(mismatch(value, 'an object such as {"max_new_tokens": 256}, or null'), at=at)
        return None
    return {str(name): _check_setting(name, item, at, problems) for name, item in value.items()}


def _check_setting(name: object, value: object, at: str, problems: Problems) -> object:
    setting = GENERATION_SETTINGS.get(name) if isinstance(name, str) else None
    if setting is None:
        problems.add(f"unknown key {shown(name)}; {_remedy(str(name))}", at=at)
        return value
    path = f"{at}.{name}"
    if setting.kind == "boolean":
        if not isinstance(value, bool):
            problems.add(mismatch(value, "true or false"), at=path)
        return value
    if setting.kind == "texts":
        return _check_texts(value, path, problems)
    _check_number(setting, value, path, problems)
    return value


def _remedy(name: str) -> str:
    if name in _REMEDIES:
        return _REMEDIES[name]
    nearest = did_you_mean(name, GENERATION_SETTINGS)
    if nearest is not None:
        return f"did you mean {nearest!r}?"
    return f"Lyra honors {', '.join(GENERATION_SETTINGS)}"


def _check_number(setting: Setting, value: object, at: str, problems: Problems) -> None:
    allowed = int if setting.kind == "whole" else (int, float)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.add(mismatch(value, setting.range_text()), at=at)
    elif not isinstance(value, allowed) or (isinstance(value, float) and not math.isfinite(value)):
        problems.add(f"{shown(value)} is not {setting.range_text()}", at=at)
    elif value < setting.minimum or (setting.above and value == setting.minimum):
        problems.add(f"{shown(value)} is too small; write {setting.range_text()}", at=at)
    elif value > (_MOST if setting.maximum is None else setting.maximum):
        problems.add(f"{shown(value)} is too large; write {setting.range_text()}", at=at)


def _check_texts(value: object, at: str, problems: Problems) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        problems.add(mismatch(value, 'a list of texts, such as ["User:"]'), at=at)
        return []
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            problems.add(mismatch(text, "text"), at=f"{at}.{position}")
        elif not text:
            problems.add("an empty text would end every answer at once; remove it", at=f"{at}.{position}")
    return list(texts)


def pipeline_kwargs_schema() -> dict[str, Any]:
    """Return the JSON Schema of `pipeline_kwargs`."""
    properties = {name: _setting_schema(setting) for name, setting in GENERATION_SETTINGS.items()}
    return {
        "anyOf": [
            {"type": "object", "properties": properties, "additionalProperties": False},
            {"type": "null"},
        ]
    }


def _setting_schema(setting: Setting) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": setting.description}
    if setting.kind == "boolean":
        return schema | {"type": "boolean"}
    if setting.kind == "texts":
        texts = {"type": "array", "items": {"type": "string", "minLength": 1}}
        return schema | {"anyOf": [{"type": "string", "minLength": 1}, texts]}
    schema["type"] = "integer" if setting.kind == "whole" else "number"
    schema["exclusiveMinimum" if setting.above else "minimum"] = setting.minimum
    return schema if setting.maximum is None else schema | {"maximum": setting.maximum}
