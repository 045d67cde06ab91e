"""What generation is asked for and what it gives, without torch: options, chunks of text, and what an answer cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.runtime.stepper import Recovery

__all__ = ["Chunk", "FinishReason", "GenerationOptions", "GenerationStats"]

FinishReason = Literal["stop", "length", "loop"]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to choose tokens, and when to end.

    Attributes:
        max_new_tokens: Most tokens to generate; what the context has no room for is not generated.
        do_sample: Draw from the distribution; otherwise take the likeliest token.
        temperature: Divides the logits when sampling; above 0.
        top_k: Keep the k likeliest tokens when sampling; 0 keeps all.
        top_p: Keep the likeliest tokens that hold this much probability when sampling; in (0, 1].
        repetition_penalty: Divides the odds of tokens that occurred (arXiv 1909.05858, section 4.1); 1 is none.
        max_repeats: End the answer where its last tokens stand more than this many times in a row; 0 is never.
        stop: Texts that end the answer; they are not part of it.
        seed: Makes sampling repeatable; None draws from torch's global generator.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_repeats: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @classmethod
    def for_model(cls, loaded: LoadedModel, overrides: Mapping[str, Any] | None = None) -> Self:
        """Return the options that hold for a model.

        Each is taken from `overrides`, else from its configuration's `pipeline_kwargs`, else from the model's own
        generation_config.json, else from the defaults here. Unknown names are ignored.
        """
        names = [field.name for field in fields(cls)]
        own = getattr(loaded.model, "generation_config", None)
        chosen = {name: getattr(own, name) for name in names if getattr(own, name, None) is not None}
        return cls.of(chosen, loaded.config.pipeline_kwargs or {}, overrides or {})

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> Self:
        """Return the options that `layers` hold, a later one before an earlier one; unknown names are ignored."""
        names = [field.name for field in fields(cls)]
        chosen: dict[str, Any] = {}
        for layer in layers:
            chosen |= {name: layer[name] for name in names if layer.get(name) is not None}
        stop = chosen.get("stop", ())
        chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if chosen.get("temperature") == 0:
            # The field's custom: temperature 0 asks for the likeliest token.
            chosen |= {"do_sample": False, "temperature": 1.0}
        return cls(**chosen)


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one answer cost.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated, the end token included.
        prefill_seconds: Until the first token was known.
        decode_seconds: From there to the end; the consumer's own time between tokens is not counted.
        recoveries: The times that memory ran out and the answer went on, in order.
        warnings: That main memory was short when the answer began, a line each.
        reused_tokens: Tokens of the prompt that did not run again, since the answer before had left them.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    recoveries: tuple[Recovery, ...] = ()
    warnings: tuple[str, ...] = ()
    reused_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; 0 where fewer than two tokens were generated."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        text: New text; may be empty while a character or a possible stop text is incomplete.
        token_ids: The tokens behind this step.
        finish_reason: "stop" (an end token or a stop text), "length" or "loop" on the last chunk, else None.
        stats: On the last chunk.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
