"""Dividing a model that transformers built into the blocks of its plan."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lyra_emergence.errors import CheckpointError
from lyra_emergence.runtime.blocks import REST, Copies, LoadedForm, PlacedBlock, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from lyra_emergence.runtime.cpu.packed_store import PackedStore

__all__ = ["split_into_blocks"]


def split_into_blocks(
    model: nn.Module, names: Iterable[tuple[str, str]], form: LoadedForm, packed: PackedStore | None = None
) -> tuple[PlacedBlock, ...]:
    """Divide a model into the blocks of its plan.

    Args:
        model: The model, its tensors mapped from the checkpoint.
        names: (name, kind) of every block of the plan.
        form: How weights look once loaded.
        packed: Where packed weights are kept from load to load, if they are.

    Returns:
        The plan's blocks in order, without those "other" ones that the model does not build (a vision tower, layers
        for multi-token prediction), then the rest block. Experts without a module of their own stay with their layer.

    Raises:
        CheckpointError: A block of the checkpoint has no module in the model.
    """
    kinds = dict(names)
    modules: dict[str, tuple[str, nn.Module]] = {}
    for name, kind in kinds.items():
        place = _find_experts(name, modules) if kind == "experts" else _find_module(model, name, kind)
        if place is not None:
            modules[name] = place
    owners = {path: name for name, (path, _) in modules.items()}
    slots: dict[str, list[Slot]] = {name: [] for name in (*modules, REST)}
    for path, slot in _slots(model):
        slots[_owner(path, owners)].append(slot)
    copies = Copies(form)
    plain = LoadedForm(form.dtype, form.stored, None)
    blocks = [
        PlacedBlock(
            name,
            module,
            slots[name],
            copies,
            form if kinds[name] == "layer" else plain,
            around=_owner(path, owners) or None,
            store=packed,
        )
        for name, (path, module) in modules.items()
    ]
    return (*blocks, PlacedBlock(REST, None, slots[REST], copies, plain))


def _find_module(model: nn.Module, name: str, kind: str) -> tuple[str, nn.Module] | None:
    """Find a checkpoint's module in the model: by its path, whose base prefix either may lack, else by its role."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    for path in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        with contextlib.suppress(AttributeError):
            return path, model.get_submodule(path)
    # transformers renames some modules on load: GPT-NeoX's "embed_out" is its "lm_head".
    getter = {"head": "get_output_embeddings", "embedding": "get_input_embeddings"}.get(kind)
    module = getattr(model, getter)() if getter else None
    if module is not None:
        return next(path for path, candidate in model.named_modules() if candidate is module), module
    if kind == "other":
        return None
    raise CheckpointError(
        f"the checkpoint's block '{name}' has no module in {type(model).__name__}",
        hint="check that config.json's architecture is the one that the weights were saved from",
    )


def _find_experts(name: str, modules: dict[str, tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
    """Find a layer's experts within its module: transformers may call what is between them otherwise."""
    layer = next((known for known in reversed(modules) if name.startswith(f"{known}.")), None)
    if layer is None:
        return None
    path, around = modules[layer]
    inside = name.removeprefix(f"{layer}.")
    places = {place: module for place, module in around.named_modules() if place.rpartition(".")[2] == "experts"}
    chosen = inside if inside in places else next(iter(places)) if len(places) == 1 else None
    return None if chosen is None else (f"{path}.{chosen}", places[chosen])


def _slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    for path, module in model.named_modules(remove_duplicate=True):
        direct = (*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False))
        for leaf, tensor in direct:
            yield (f"{path}.{leaf}" if path else leaf), Slot(module, leaf, tensor)


def _owner(path: str, owners: dict[str, str]) -> str:
    """Return the block whose module is the nearest one around the tensor at `path`."""
    while path:
        path = path.rpartition(".")[0]
        if path in owners:
            return owners[path]
    return REST
