"""Makes a trained model deeper: a new layer begins as a copy of the one before it that adds nothing yet.

Depth growth as in "bert2BERT" (Chen et al., ACL 2022) and "Llama Pro" (Wu et al., 2024): with the copy's two output
matrices at zero, the deeper model answers as the trained one does, and goes on learning from there.
"""

import re
from collections.abc import Mapping

import torch

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def layer_count(state: Mapping[str, torch.Tensor]) -> int:
    """Returns the number of layers whose weights `state` holds, named as transformers names them."""
    return 1 + max(int(match[1]) for name in state if (match := _LAYER.search(name)))


def deepened(state: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Returns the weights of a model of `layers` layers that computes what `state`'s model does.

    The middle layers are doubled: there the model compares sentences with the question; it reads before, and copies
    after.

    Raises:
        ValueError: `layers` is less than what `state` has, or more than twice that.
    """
    have = layer_count(state)
    extra = layers - have
    if not 0 <= extra <= have:
        raise ValueError(f"a model of {have} layers cannot become one of {layers}: {have} to {2 * have} can")
    first = (have - extra + 1) // 2
    grown: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        match = _LAYER.search(name)
        if match is None:
            grown[name] = weight
            continue
        old = int(match[1])
        at = old + min(max(old - first, 0), extra)
        grown[_renamed(name, at)] = weight
        if first <= old < first + extra:
            copy = torch.zeros_like(weight) if name.endswith(_OUTPUTS) else weight.clone()
            grown[_renamed(name, at + 1)] = copy
    return grown


def _renamed(name: str, layer: int) -> str:
    return _LAYER.sub(f"layers.{layer}.", name)
