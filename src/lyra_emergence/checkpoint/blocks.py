"""The blocks of a decoder in the order they run, found from the names and shapes of its tensors.

Repeated layers are what the names number, whatever the architecture calls them: the first number in a name is the
layer's, so other numbered parts inside a layer stay in it. The experts of a mixture are a block of their own beside the
rest of their layer: a token reads a few of them, so they can wait in slower memory. Of several numbered stacks (a
vision tower beside a language model) the layers are the stack whose count config.json states for the language model,
and among such stacks the largest. What lies outside the stacks is known by its role (`roles.py`).

A head is tied, and its weight counted once, where config.json says so or its model type does by default, or where no
head is stored and config.json does not object. A copy that is stored although tied is taken for equal by its dtype and
shape: values are not read. (Where the copies differ, transformers warns and does not tie.)

Not covered: models that run several stacks, such as an encoder and a decoder (one is taken for the layers), and the
composite heads of BERT's kin. Names are the checkpoint's: transformers renames some while it loads (GPT-NeoX stores
`embed_out` for the module `lm_head`, official GPT-2 `h.0` for `transformer.h.0`), and whoever loads finds the module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lyra_emergence.checkpoint.architecture import prediction_layers, stated_layers, ties_embeddings, usual_head
from lyra_emergence.checkpoint.roles import Roles, Surroundings, find_roles
from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lyra_emergence.checkpoint.safetensors_header import TensorInfo

__all__ = ["Block", "BlockKind", "find_blocks"]

BlockKind = Literal["embedding", "layer", "experts", "norm", "head", "other"]

_EXPERTS = re.compile(r"(?P<module>.+?\.experts)\.")
_ATTENTION = re.compile(r"\.[a-z_]*att(?:entio)?n[a-z_]*\.")
"""A mixture within attention (JetMoe) runs in two halves around it, and is not called as a module."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model that is placed as one.

    Attributes:
        name: Module path as the checkpoint names it, such as "model.layers.0".
        kind: Its role in the order of execution.
        index: The number of a layer, or of the layer that experts belong to; None for all others.
        tensors: Names of its own tensors, in file order; a head that is tied and has no bias has none.
        nbytes: Bytes of its own tensors in the files.
        tied_to: Name of the block that holds its weight, None where it holds its own.
    """

    name: str
    kind: BlockKind
    index: int | None
    tensors: tuple[str, ...]
    nbytes: int
    tied_to: str | None = None


@dataclass(slots=True)
class _Stack:
    layers: dict[int, list[TensorInfo]] = field(default_factory=dict)
    nbytes: int = 0


_Modules = dict[str, list["TensorInfo"]]


def find_blocks(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str) -> tuple[Block, ...]:
    """Return the blocks in execution order: embeddings, other modules, layers, final norm, head.

    Args:
        tensors: Every tensor of the checkpoint.
        config: The parsed config.json.
        where: The checkpoint's folder; it begins the message of each error.

    Raises:
        CheckpointError: No layers, a layer missing, a number of layers that config.json contradicts, or no weight
            for the head.
    """
    stacks, loose = _split(tensors.values())
    counts = stated_layers(config, f"{where}/config.json")
    extra = prediction_layers(config)
    prefix = _language_stack(stacks, {count + more for count in counts.values() for more in (0, extra)}, where)
    stack = stacks.pop(prefix)
    _check_numbering(prefix, stack, where)
    total = _check_count(prefix, len(stack.layers), counts, extra, where)
    layers = [block for i in range(total) for block in _layer(f"{prefix}.{i}", i, stack.layers[i])]
    others = [_block(f"{prefix}.{i}", "other", stack.layers[i]) for i in range(total, len(stack.layers))]
    others += [_block(f"{name}.{i}", "other", found) for name, s in stacks.items() for i, found in s.layers.items()]
    modules = _own_modules(loose, {block.name for block in (*layers, *others)})
    roles = find_roles(modules, Surroundings.of(prefix, tuple(stacks), config))
    others += [_block(name, "other", modules[name]) for name in roles.others]
    embeddings = [_block(name, "embedding", modules[name]) for name in roles.embeddings]
    norms = [_block(name, "norm", modules[name]) for name in roles.norms]
    tied = ties_embeddings(config)
    head = _head(roles, modules, tied, usual_head(config), where)
    if not embeddings:
        embeddings = [_shared_embedding(prefix, head, tied, where)]
    return (*embeddings, *others, *layers, *norms, head)


def _layer(name: str, index: int, tensors: Sequence[TensorInfo]) -> Iterator[Block]:
    """Yield a layer without its experts, then these, in file order."""
    experts: dict[str, list[TensorInfo]] = {}
    rest: list[TensorInfo] = []
    for tensor in tensors:
        module = _experts_of(tensor.name, name)
        (rest if module is None else experts.setdefault(module, [])).append(tensor)
    yield _block(name, "layer", rest, index=index)
    for module, held in experts.items():
        yield _block(module, "experts", held, index=index)


def _experts_of(tensor: str, layer: str) -> str | None:
    """Return the module of the experts that a layer's tensor belongs to, if it does."""
    if ".experts." not in tensor:
        return None
    found = _EXPERTS.match(tensor)
    return found["module"] if found and not _ATTENTION.search(tensor, len(layer)) else None


def _split(tensors: Iterable[TensorInfo]) -> tuple[dict[str, _Stack], _Modules]:
    """Return the numbered stacks by the path before the number, and all other tensors by their module path."""
    stacks: dict[str, _Stack] = {}
    loose: _Modules = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        at = next((i for i, part in enumerate(parts) if i and _NUMBER.fullmatch(part)), None)
        if at is None or at == len(parts) - 1:
            loose.setdefault(".".join(parts[:-1]) or tensor.name, []).append(tensor)
            continue
        stack = stacks.setdefault(".".join(parts[:at]), _Stack())
        stack.layers.setdefault(int(parts[at]), []).append(tensor)
        stack.nbytes += tensor.nbytes
    return stacks, loose


def _language_stack(stacks: Mapping[str, _Stack], counts: set[int], where: str) -> str:
    if not stacks:
        raise CheckpointError(
            f"{where}: no tensor name numbers a layer (such as 'model.layers.0.…')",
            hint="this is no decoder-only language model, or its names were changed",
        )
    return max(stacks, key=lambda prefix: (len(stacks[prefix].layers) in counts, stacks[prefix].nbytes))


def _check_numbering(prefix: str, stack: _Stack, where: str) -> None:
    missing = next((i for i in range(len(stack.layers)) if i not in stack.layers), None)
    if missing is not None:
        raise CheckpointError(
            f"{where}: layer {prefix}.{missing} is missing, though {prefix}.{max(stack.layers)} is there",
            hint="the checkpoint is incomplete; download or copy it again",
        )


def _check_count(prefix: str, found: int, counts: Mapping[str, int], extra: int, where: str) -> int:
    """Return how many of the `found` layers are the model's own; the rest only predict further tokens."""
    if not counts or found in counts.values():
        return found
    own = next((count for count in counts.values() if found == count + extra), None)
    if own is None:
        said = ", ".join(f"'{key}': {count}" for key, count in counts.items())
        raise CheckpointError(
            f"{where}: config.json says {said}, but the weights hold {found} layers, "
            f"{prefix}.0 to {prefix}.{found - 1}",
            hint="config.json and the weights must come from the same checkpoint",
        )
    return own


def _own_modules(loose: _Modules, block_names: set[str]) -> _Modules:
    """Split a module that other blocks lie in, tensor by tensor: in a device map its name would stand for them too."""
    outer: set[str] = set()
    for name in (*block_names, *loose):
        parts = name.split(".")
        outer.update(".".join(parts[:i]) for i in range(1, len(parts)))
    modules: _Modules = {}
    for name, tensors in loose.items():
        if name in outer:
            modules.update({tensor.name: [tensor] for tensor in tensors})
        else:
            modules[name] = tensors
    return modules


def _block(
    name: str,
    kind: BlockKind,
    tensors: Sequence[TensorInfo],
    *,
    index: int | None = None,
    tied_to: str | None = None,
) -> Block:
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Block(name, kind, index, tuple(tensor.name for tensor in tensors), nbytes, tied_to)


def _head(roles: Roles, modules: _Modules, tied: bool | None, usual: str, where: str) -> Block:
    """Return the head's block; `usual` is its name where nothing of it is stored."""
    stored = modules[roles.head] if roles.head is not None else []
    table = modules[roles.embeddings[0]] if roles.embeddings else []
    weights = [tensor for tensor in stored if not tensor.name.endswith(".bias")]
    name = roles.head or usual
    if weights and not (tied and _are_copies(weights, table)):
        return _block(name, "head", stored)
    if not weights and tied is False:
        raise CheckpointError(
            f"{where}: no weight for the language model's head, and config.json says 'tie_word_embeddings': false",
            hint="the checkpoint is incomplete, or it was saved from a model without a head",
        )
    if not table:
        raise CheckpointError(
            f"{where}: neither an input embedding nor a head was found among the tensors",
            hint="config.json and the weights must come from the same checkpoint",
        )
    bias = [tensor for tensor in stored if tensor not in weights]
    return _block(name, "head", bias, tied_to=roles.embeddings[0])


def _are_copies(weights: Sequence[TensorInfo], table: Sequence[TensorInfo]) -> bool:
    return [(t.dtype, t.shape) for t in weights] == [(t.dtype, t.shape) for t in table]


def _shared_embedding(stack: str, head: Block, tied: bool | None, where: str) -> Block:
    """Return the block of an embedding whose weight is stored only under the head's name.

    transformers ties in that direction too. The embedding's own name is a guess from the stack's.
    """
    if tied is False:
        raise CheckpointError(
            f"{where}: no input embedding, and config.json says 'tie_word_embeddings': false",
            hint="the checkpoint is incomplete; download or copy it again",
        )
    parent, _, last = stack.rpartition(".")
    name = "wte" if last == "h" else "embed_tokens"
    return _block(f"{parent}.{name}" if parent else name, "embedding", (), tied_to=head.name)
