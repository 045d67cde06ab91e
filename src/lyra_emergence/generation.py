"""Generating text token by token from a loaded model.

A synchronous generator: the consumer's pace is the model's pace, an error reaches the consumer at the token where it
happens, and closing the generator ends the work. Prompts run in chunks, so that activations stay bounded. Several
generators may share one model from several threads: steps take turns. Where memory runs out, the answer goes on
(`runtime/stepper.py`).
"""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from lyra_emergence.errors import GenerationError
from lyra_emergence.runtime.prompt_cache import PromptCache
from lyra_emergence.runtime.stepper import Recovery, Stepper
from lyra_emergence.text_stream import LoopDetector, StopScanner, TextDecoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lyra_emergence.loading import LoadedModel

__all__ = [
    "Chunk",
    "FinishReason",
    "GenerationOptions",
    "GenerationStats",
    "PromptCache",
    "Recovery",
    "Stepper",
    "encode_prompt",
    "stream_generate",
]

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
        for layer in (loaded.config.pipeline_kwargs or {}, overrides or {}):
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


def encode_prompt(loaded: LoadedModel, prompt: str | Sequence[int]) -> list[int]:
    """Return the prompt's token ids.

    A text that already begins with the beginning-of-sequence token, as a chat template writes it, gets no second one.

    Raises:
        GenerationError: The prompt is empty, or leaves no room for an answer in the context.
    """
    ids = _tokenize(loaded.tokenizer, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        start = getattr(loaded.tokenizer, "bos_token_id", None)
        if start is None:
            raise GenerationError("the prompt is empty", hint="write something to continue from")
        ids = [start]
    if len(ids) >= loaded.context_length:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens, and the context holds {loaded.context_length} with the answer",
            hint="shorten the prompt, or give a longer context (--context, 'context_length') if the model allows it",
        )
    return ids


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    start: str | None = getattr(tokenizer, "bos_token", None)
    begun = bool(start) and text.startswith(start or "")
    # verbose=False: a text beyond the context is refused by `encode_prompt`; transformers would only log a warning.
    return list(tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"])


def stream_generate(
    loaded: LoadedModel,
    prompt: str | Sequence[int],
    options: GenerationOptions | None = None,
    *,
    kept: PromptCache | None = None,
) -> Iterator[Chunk]:
    """Generate an answer to `prompt`, a chunk per token.

    Args:
        loaded: A loaded model.
        prompt: Text, or token ids (batch of one).
        options: How to choose tokens; by default what `GenerationOptions.for_model` returns.
        kept: A conversation's own, for all its prompts: what a prompt begins with as the one before did, or its
            answer, does not run again.

    Raises:
        GenerationError: The prompt is empty or too long, or an option is out of its range.
        DoesNotFitError: Memory ran out at a token, and neither shorter chunks nor the CPU could help; the text before
            it was delivered, and the model can be used as before.
    """
    options = options or GenerationOptions.for_model(loaded)
    _check(options)
    ids = encode_prompt(loaded, prompt)
    room = loaded.context_length - len(ids)
    return _generate(loaded, ids, replace(options, max_new_tokens=min(options.max_new_tokens, room)), kept)


def _check(options: GenerationOptions) -> None:
    wrong = {
        "max_new_tokens": options.max_new_tokens < 1,
        "temperature": options.temperature <= 0,
        "top_k": options.top_k < 0,
        "top_p": not 0 < options.top_p <= 1,
        "repetition_penalty": options.repetition_penalty <= 0,
        "max_repeats": options.max_repeats < 0,
        "stop": "" in options.stop,
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        value = getattr(options, name)
        raise GenerationError(f"'{name}': {value!r} is out of range", hint="see GenerationOptions for the ranges")


def _generate(
    loaded: LoadedModel, prompt: list[int], options: GenerationOptions, kept: PromptCache | None
) -> Iterator[Chunk]:
    ends = _end_tokens(loaded)
    decoder = TextDecoder(loaded.tokenizer, prompt)
    scanner = StopScanner(options.stop)
    loops = LoopDetector(options.max_repeats)
    chooser = _Chooser(prompt, options)
    with closing(Stepper(loaded, most_tokens=len(prompt) + options.max_new_tokens, kept=kept)) as stepper:
        clock = time.perf_counter()
        stepper.make_room()
        token = _choose(chooser, stepper, stepper.prefill(prompt))
        prefill_seconds, decode_seconds, count = time.perf_counter() - clock, 0.0, 1
        while True:
            text = "" if token in ends else scanner.push(decoder.push(token))
            reason: FinishReason | None = "stop" if token in ends or scanner.found else None
            if reason is None and loops.push(token):
                reason = "loop"
            if reason is None and count >= options.max_new_tokens:
                reason = "length"
            if reason is not None:
                told = (tuple(stepper.recoveries), tuple(stepper.warnings), stepper.reused)
                stats = GenerationStats(len(prompt), count, prefill_seconds, decode_seconds, *told)
                rest = "" if scanner.found else scanner.finish(decoder.finish())
                yield Chunk(text + rest, (token,), reason, stats)
                return
            yield Chunk(text, (token,))
            clock = time.perf_counter()
            token = _choose(chooser, stepper, stepper.step(token))
            decode_seconds += time.perf_counter() - clock
            count += 1


def _choose(chooser: _Chooser, stepper: Stepper, logits: torch.Tensor) -> int:
    # A device that has nothing left cannot even say which is the largest: the second try is made on the CPU.
    tries = itertools.chain([logits], itertools.repeat(None))
    return stepper.surviving(lambda: chooser.choose(logits.cpu() if next(tries) is None else logits))


def _end_tokens(loaded: LoadedModel) -> frozenset[int]:
    own = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    own = own if own is not None else getattr(loaded.tokenizer, "eos_token_id", None)
    return frozenset(own if isinstance(own, list | tuple) else () if own is None else (own,))


class _Chooser:
    """Chooses tokens from logits: the likeliest, or a draw."""

    def __init__(self, prompt: list[int], options: GenerationOptions) -> None:
        from transformers import LogitsProcessorList

        self._options = options
        self._ids = list(prompt)
        self._processors = LogitsProcessorList(_processors(options))
        self._generator: torch.Generator | None = None
        if options.seed is not None:
            self._generator = torch.Generator().manual_seed(options.seed)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token for `logits`, (1, vocab), and remember it.

        Draws happen on the CPU, so that a seed gives the same answer wherever the head is.
        """
        if self._processors or self._options.do_sample:
            logits = self._processors(torch.tensor([self._ids]), logits.cpu())
        token = self._draw(logits) if self._options.do_sample else int(logits.argmax(-1))
        self._ids.append(token)
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        """Draw a token; where memory runs out, the random numbers are where they were before."""
        state = self._generator.get_state() if self._generator is not None else torch.get_rng_state()
        try:
            return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))
        except BaseException:
            if self._generator is not None:
                self._generator.set_state(state)
            else:
                torch.set_rng_state(state)
            raise


def _processors(options: GenerationOptions) -> Iterator[Any]:
    from transformers.generation import logits_process as processes

    if options.repetition_penalty != 1:
        yield processes.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
    if not options.do_sample:
        return
    if options.temperature != 1:
        yield processes.TemperatureLogitsWarper(options.temperature)
    if options.top_k > 0:
        yield processes.TopKLogitsWarper(options.top_k)
    if options.top_p < 1:
        yield processes.TopPLogitsWarper(options.top_p)
