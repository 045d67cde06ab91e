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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.chunks import Chunk, FinishReason, GenerationOptions, GenerationStats
from lyra_emergence.errors import GenerationError
from lyra_emergence.runtime.prompt_cache import PromptCache
from lyra_emergence.runtime.stepper import Recovery, Stepper
from lyra_emergence.text_stream import LoopDetector, StopScanner, TextDecoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
    abandoned: Callable[[], bool] | None = None,
) -> Iterator[Chunk]:
    """Generate an answer to `prompt`, a chunk per token.

    Args:
        loaded: A loaded model.
        prompt: Text, or token ids (batch of one).
        options: How to choose tokens; by default what `GenerationOptions.for_model` returns.
        kept: A conversation's own, for all its prompts: what a prompt begins with as the one before did, or its
            answer, does not run again.
        abandoned: Asked before every pass of the model, and so also between the chunks of a long prompt, whether nobody
            waits for the answer any more.

    Raises:
        AbandonedError: `abandoned` said so.
        GenerationError: The prompt is empty or too long, or an option is out of its range.
        DoesNotFitError: Memory ran out at a token, and neither shorter chunks nor the CPU could help; the text before
            it was delivered, and the model can be used as before.
    """
    options = options or GenerationOptions.for_model(loaded)
    _check(options)
    ids = encode_prompt(loaded, prompt)
    room = loaded.context_length - len(ids)
    return _generate(loaded, ids, replace(options, max_new_tokens=min(options.max_new_tokens, room)), kept, abandoned)


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
    loaded: LoadedModel,
    prompt: list[int],
    options: GenerationOptions,
    kept: PromptCache | None,
    abandoned: Callable[[], bool] | None,
) -> Iterator[Chunk]:
    ends = _end_tokens(loaded)
    decoder = TextDecoder(loaded.tokenizer, prompt)
    scanner = StopScanner(options.stop)
    loops = LoopDetector(options.max_repeats)
    chooser = _Chooser(prompt, options)
    most = len(prompt) + options.max_new_tokens
    with closing(Stepper(loaded, most_tokens=most, kept=kept, abandoned=abandoned)) as stepper:
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
