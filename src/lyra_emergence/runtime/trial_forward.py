"""Running a model on the meta device and counting the bytes that live on it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.activations import Activations
from lyra_emergence.runtime.library_settings import settings_for_loading
from lyra_emergence.runtime.live_bytes import FusedAttention, LiveBytes
from lyra_emergence.runtime.stepping import Feeding, caches_of, feeding_of
from lyra_emergence.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex

__all__ = ["UntriedError", "build_without_memory", "run_trial"]

_SINGLE_TOKENS = 2
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass took, as `LiveBytes` counts it, and what its caches held after it; in bytes."""

    peak: int
    cpu_peak: int
    projecting: int
    held: int

    @classmethod
    def most(cls, passes: Sequence[_Pass], full: int) -> _Pass:
        """Return the most that any of `passes` took beside `full` bytes of caches."""
        figures = zip(*((one.peak, one.cpu_peak, one.projecting) for one in passes), strict=True)
        peak, cpu_peak, projecting = (max(0, max(figure) - full) for figure in figures)
        return cls(peak, cpu_peak, projecting, full)

    def plus(self, nbytes: int) -> _Pass:
        """Return the same with `nbytes` that are there all the time."""
        return _Pass(self.peak + nbytes, self.cpu_peak + nbytes, self.projecting + nbytes, self.held)


class UntriedError(Exception):
    """The trial could not be run; the message says why in a few words."""


def run_trial(
    index: CheckpointIndex, context: int, batch: int, dtype: str, chunk: int, *, trust_remote_code: bool
) -> Trial:
    """Run the trial; the arguments are those of `find_trial`.

    Raises:
        UntriedError: transformers cannot build the model from its config.json, or its forward pass needs data.
    """
    model = build_without_memory(index, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    try:
        return _count(model, context, batch, chunk)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UntriedError(f"its forward pass needs data: {_first_line(error)}") from error


def build_without_memory(index: CheckpointIndex, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """Return the checkpoint's model on the meta device, where it has shapes and no memory.

    Raises:
        UntriedError: transformers cannot build it from its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if "auto_map" in index.config and not trust_remote_code:
        raise UntriedError("its code comes with the checkpoint, and 'trust_remote_code' is false")
    try:
        config = _configuration(index, AutoConfig, trust_remote_code=trust_remote_code)
        with settings_for_loading(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a foreign config.json makes transformers raise, planning goes on
        raise UntriedError(f"transformers does not build it: {_first_line(error)}") from error
    # Some models look for it in their input, only to warn of a missing mask.
    model.config.pad_token_id = None
    return model.eval().requires_grad_(requires_grad=False)


def _configuration(index: CheckpointIndex, reader: Any, *, trust_remote_code: bool) -> Any:
    """Return transformers' configuration, read from a file as transformers writes them, which is how it checks them."""
    if trust_remote_code:
        return reader.from_pretrained(index.directory, local_files_only=True, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(index.config)), encoding="utf-8")
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _count(model: Any, context: int, batch: int, chunk: int) -> Trial:
    feeding = feeding_of(model, chunk)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    caches: dict[str, Any] = {}
    layers: list[int] = []
    passes: list[_Pass] = []
    logits = before = 0
    with torch.inference_mode(), FusedAttention(live), live:
        for tokens, counted in _steps(context, feeding):
            live.forget_peaks()
            before = len(live.products)
            caches, logits = _step(model, feeding, caches, (batch, tokens))
            if not counted:
                continue
            sizes = _cache_sizes(caches)
            passes.append(_Pass(live.peak, live.cpu_peak, live.projecting, sum(sizes)))
            layers = [max(pair) for pair in zip(layers, sizes, strict=True)] if layers else sizes
    stored = model.state_dict()
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in stored)
    config = model.config.get_text_config()
    rows = batch * min(context, feeding.chunk or context)
    hidden = rows * int(getattr(config, "hidden_size", 0)) * model.dtype.itemsize
    head = 2 * hidden + max(logits, 2 * hidden * _FLOAT32 // model.dtype.itemsize)
    full = sum(layers)
    first, *later = passes
    in_layer, in_earlier = _Pass.most(later, full).plus(tables), _Pass.most([first], first.held).plus(tables)
    filled = min(1.0, first.held / full) if full else 1.0
    return Trial(
        kv_cache=_by_layer(layers, int(getattr(config, "num_hidden_layers", len(layers)))),
        activations=Activations(
            embedding=2 * hidden,
            layer=in_layer.peak,
            head=head,
            earlier=in_earlier.peak,
            filled=filled,
            # The count does not tell a layer's experts from the rest of it.
            experts=in_layer.peak,
            earlier_experts=in_earlier.peak,
            experts_alone=max(in_layer.peak, in_earlier.peak),
            cpu_layer=in_layer.cpu_peak,
            earlier_cpu_layer=in_earlier.cpu_peak,
            projecting=in_layer.projecting,
            earlier_projecting=in_earlier.projecting,
        ),
        whole=feeding.chunk is None,
        products=len(live.products),
        growing=len(live.products) > before,
    )


def _steps(context: int, feeding: Feeding) -> Iterator[tuple[int, bool]]:
    """Yield the tokens of each pass, and whether it is counted.

    A prompt runs in chunks from its beginning, so that the fullest moment is that of the last whole chunk in the
    context, or of what is left behind it. What comes before the last whole chunk runs as one, to fill the caches.
    """
    prompt = max(1, context - _SINGLE_TOKENS)
    chunk = min(feeding.chunk or prompt, prompt)
    before = max(0, context // chunk * chunk - chunk) if feeding.chunk else 0
    if before:
        yield before, False
    yield min(chunk, prompt - before), True
    if prompt > before + chunk:
        yield prompt - before - chunk, True
    for _ in range(_SINGLE_TOKENS):
        yield 1, True


def _step(model: Any, feeding: Feeding, caches: dict[str, Any], shape: tuple[int, int]) -> tuple[dict[str, Any], int]:
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    output = model(input_ids=ids, use_cache=True, **caches, **feeding.arguments)
    logits = output.logits
    row = logits[:, -1].float()
    return caches_of(output), logits.nbytes + row.nbytes


def _cache_sizes(caches: dict[str, Any]) -> list[int]:
    """Return the bytes of each layer's cache, or of all together where a cache does not tell its layers apart."""
    sizes: list[int] = []
    for cache in caches.values():
        parts = getattr(cache, "layers", None) or [cache]
        sizes += [sum(_storages(part).values()) for part in parts]
    return sizes


def _storages(value: Any, depth: int = 4) -> dict[int, int]:
    """Return the bytes of every storage that tensors in `value` hold, by its id."""
    if isinstance(value, torch.Tensor):
        return {id(value.untyped_storage()): value.untyped_storage().nbytes()}
    if depth == 0:
        return {}
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif hasattr(value, "__dict__"):
        inside = vars(value).values()
    found: dict[int, int] = {}
    for part in inside:
        found |= _storages(part, depth - 1)
    return found


def _by_layer(sizes: list[int], layers: int) -> tuple[int, ...]:
    """Return a size for each of `layers` layers; an undivided one is spread evenly, rounded up."""
    if len(sizes) == layers or not sizes:
        return tuple(sizes)
    return (-(-sum(sizes) // layers),) * layers
