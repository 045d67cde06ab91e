"""Running a model on the meta device and counting the bytes that live on it."""

from __future__ import annotations

import json
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lyra_emergence.activations import Activations
from lyra_emergence.runtime.library_settings import settings_for_loading
from lyra_emergence.runtime.stepping import Feeding, caches_of, feeding_of
from lyra_emergence.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex

__all__ = ["LiveBytes", "UntriedError", "run_trial"]

_SINGLE_TOKENS = 2
_FLOAT32 = 4


class UntriedError(Exception):
    """The trial could not be run; the message says why in a few words."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts the bytes of every storage that operators make, from its making until nothing holds it.

    Attributes:
        now: Bytes alive.
        peak: The most that `now` was since it was last set.

    Args:
        known: Tensors that were there before, such as weights; they are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # Held by their storages' ids; the weak reference says when an id is free again.
        self._seen: dict[int, Any] = {id(storage): storage for storage in (t.untyped_storage() for t in known)}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, by its parts where it has parts, and count what it makes."""
        kwargs = kwargs or {}
        with self:
            # Where autograd is off, an operator made of others arrives whole: its own temporaries count too.
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: object) -> None:
        if self._seen.pop(key, None) is not None:
            self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Stands in for fused attention, which has no kernel on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: object,
    **__: object,
) -> torch.Tensor:
    """Makes what the fused kernels make: the mask in the query's dtype, a row of sums, and the output."""
    del key
    rows, heads, tokens, _width = query.shape
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    output = query.new_empty((rows, tokens, heads, value.shape[-1])).transpose(1, 2)
    sums = query.new_empty((rows, heads, tokens), dtype=torch.float32)
    del mask, sums
    return output


def run_trial(
    index: CheckpointIndex, context: int, batch: int, dtype: str, chunk: int, *, trust_remote_code: bool
) -> Trial:
    """Run the trial; the arguments are those of `find_trial`.

    Raises:
        UntriedError: transformers cannot build the model from its config.json, or its forward pass needs data.
    """
    model = _build(index, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    try:
        return _count(model, context, batch, chunk)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UntriedError(f"its forward pass needs data: {_first_line(error)}") from error


def _build(index: CheckpointIndex, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
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
    passes: list[tuple[int, int]] = []
    logits = 0
    with torch.inference_mode(), _FusedAttention(), live:
        for tokens, counted in _steps(context, feeding):
            live.peak = live.now
            caches, logits = _step(model, feeding, caches, (batch, tokens))
            if not counted:
                continue
            sizes = _cache_sizes(caches)
            passes.append((live.peak, sum(sizes)))
            layers = [max(pair) for pair in zip(layers, sizes, strict=True)] if layers else sizes
    stored = model.state_dict()
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in stored)
    config = model.config.get_text_config()
    rows = batch * min(context, feeding.chunk or context)
    hidden = rows * int(getattr(config, "hidden_size", 0)) * model.dtype.itemsize
    head = 2 * hidden + max(logits, 2 * hidden * _FLOAT32 // model.dtype.itemsize)
    full = sum(layers)
    (earlier, held), *later = passes
    in_layer, in_earlier = max(0, *(peak - full for peak, _ in later)) + tables, max(0, earlier - held) + tables
    filled = min(1.0, held / full) if full else 1.0
    return Trial(
        kv_cache=_by_layer(layers, int(getattr(config, "num_hidden_layers", len(layers)))),
        activations=Activations(
            embedding=2 * hidden,
            layer=in_layer,
            head=head,
            earlier=in_earlier,
            filled=filled,
            # The count does not tell a layer's experts from the rest of it.
            experts=in_layer,
            earlier_experts=in_earlier,
            experts_alone=max(in_layer, in_earlier),
        ),
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
